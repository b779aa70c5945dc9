"""The demo's commands and its table; `make demo` itself is run as a whole elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsify.cli import demo

Run = Any


def test_the_commands_are_accepted_and_the_table_is_made(
    run: Run, dense_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_MODEL", str(dense_model))
    small = {
        "convert": ["--calibration", str(text_file), "--sequences", "4", "--seq-len", "32", "--eval-windows", "0"],
        "eval": ["--text", str(text_file), "--seq-len", "32", "--limit", "2"],
        "generate": ["--max-new-tokens", "4"],
        "bench": ["--new-tokens", "2", "--rounds", "2", "--prompt-tokens", "8"],
    }
    for _, verb, *arguments in demo.commands(tmp_path, tmp_path / "out"):
        result = run(verb, *arguments, *small[verb])
        assert result.exit_code == 0, result.output
    quality = json.loads((tmp_path / "eval.json").read_text())["models"][0]
    speed = json.loads((tmp_path / "bench.json").read_text())
    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(demo.summary(quality, speed))
    shown = console.export_text()
    for row in ("perplexity", "nominal", "parameter-weighted", "realised", "bytes of weights", "tokens per second"):
        assert row in shown


def test_a_second_demo_removes_the_first_one_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console, out = Console(), tmp_path / "out"
    out.mkdir()
    assert not demo._make_room(console, tmp_path, out)
    assert out.is_dir()
    (out / "sparsify_manifest.json").write_text("{}")
    assert demo._make_room(console, tmp_path, out)
    assert not out.exists()
    assert "$ rm -r" in capsys.readouterr().out
