"""The demo's commands and its table; `make demo` itself is run as a whole elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig

from sparsify.cli import demo
from sparsify.evals import machine, stream
from sparsify.evals.shapes import SHAPES
from sparsify.kernels import library

Run = Any


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that is made in no time in the place of the demo's, and a small stream."""
    values = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    monkeypatch.setitem(SHAPES, "tiny", (LlamaConfig, values))
    monkeypatch.setattr(demo, "_SHAPE", "tiny")
    monkeypatch.setattr(stream, "_LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(stream, "cache_of", lambda device: None)


def test_the_commands_are_accepted_and_the_table_is_made(
    run: Run, dense_model: Path, text_file: Path, tmp_path: Path, tiny_shape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_MODEL", str(dense_model))
    small = {
        "convert": ["--calibration", str(text_file), "--sequences", "4", "--seq-len", "32", "--eval-windows", "0"],
        "eval": ["--text", str(text_file), "--seq-len", "32", "--limit", "2"],
        "generate": ["--max-new-tokens", "4"],
        "bench": ["--new-tokens", "2", "--rounds", "2", "--prompt-tokens", "8"],
    }
    for _, verb, *arguments in demo.commands(tmp_path, tmp_path / "out", shape=True):
        result = run(verb, *arguments, *small[verb])
        assert result.exit_code == 0, result.output
    quality = json.loads((tmp_path / "eval.json").read_text())["models"][0]
    speeds = [json.loads(path.read_text()) for path in demo.results(tmp_path)]
    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(demo.summary(quality, speeds))
    shown = console.export_text()
    for row in (
        "perplexity", "nominal", "parameter-weighted", "realised", "bytes of weights",
        "tokens per second, this model at", "tokens per second, tiny at",
    ):  # fmt: skip
        assert row in shown
    assert shown.count("tokens per second, tiny at") == 2


def test_the_shape_is_left_out_where_the_machine_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "load", lambda: object())
    monkeypatch.setattr(machine, "available_memory", lambda device: 9 << 30)
    assert demo.shape_problem() is None
    monkeypatch.setattr(machine, "available_memory", lambda device: 4 << 30)
    assert demo.shape_problem() == "which wants 8.59 GB of free memory, and 4.29 GB are there"
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "missing", lambda: "not built: do this")
    assert demo.shape_problem() == "not built: do this"
    verbs = [command[1] for command in demo.commands(tmp_path, tmp_path / "out", shape=False)]
    assert verbs == ["convert", "eval", "generate", "bench"]


def test_a_second_demo_removes_the_first_one_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console, out = Console(), tmp_path / "out"
    out.mkdir()
    assert not demo._make_room(console, tmp_path, out)
    assert out.is_dir()
    (out / "sparsify_manifest.json").write_text("{}")
    old = demo.results(tmp_path)[1]
    old.write_text("{}")
    assert demo._make_room(console, tmp_path, out)
    assert not out.exists()
    assert not old.exists()
    assert "$ rm -r" in capsys.readouterr().out
