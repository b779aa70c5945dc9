"""`sparsify bench`: what was measured, and a plain sentence about it."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsify.cli.bench import statement

Run = Any


def test_both_sides_are_measured(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--rounds", "2", "--new-tokens", "4", "--prompt-tokens", "8", "--save", tmp_path / "bench.json"]
    result = run("bench", checkpoint, *flags)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["rounds"] == 2
    assert data["statement"].split()[0] in result.stdout
    for side in ("dense", "sparse"):
        assert f"{data[side]['tokens_per_second']:.1f}" in result.stdout


def test_a_dense_model_is_measured_alone(run: Run, dense_model: Path) -> None:
    result = run("bench", dense_model, "--rounds", "1", "--new-tokens", "2", "--prompt-tokens", "8")
    assert result.exit_code == 0, result.output
    assert "sparse  " not in result.stdout
    assert "Dense is faster" not in result.stdout


@pytest.mark.parametrize(
    ("ratio", "backends", "words"),
    [
        ((0.7, 0.6, 0.8), ["reference"], ["Dense is faster", "0.70×", "reads every weight byte"]),
        ((0.7, 0.6, 0.8), ["cpu"], ["Dense is faster", "0.70×"]),
        ((1.0, 0.9, 1.1), ["cpu"], ["No clear difference"]),
        ((1.6, 1.5, 1.7), ["cpu"], ["Sparse is faster", "1.60×"]),
    ],
)
def test_statement(ratio: tuple[float, float, float], backends: list[str], words: list[str]) -> None:
    said = statement({"ratio": dict(zip(("median", "p10", "p90"), ratio, strict=True)), "backends": backends})
    assert all(word in said for word in words)
    assert said.count(".") - said.count("×") <= 1 or said.endswith(".")


def test_bad_settings(run: Run, checkpoint: Path) -> None:
    result = run("bench", checkpoint, "--new-tokens", "9999", "--prompt-tokens", "8")
    assert result.exit_code == 2
    assert "positions" in result.stderr.splitlines()[-1]
