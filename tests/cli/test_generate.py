"""`sparsify generate`: both continuations of one prompt."""

import json
from pathlib import Path
from typing import Any

import pytest

Run = Any


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_side_by_side(run: Run, checkpoint: Path, prefill: str) -> None:
    flags = ["--prompt", "def mean(", "--max-new-tokens", "6", "--prefill", prefill]
    data = json.loads(run("generate", checkpoint, *flags, "--format", "json").stdout)
    assert data["prefill"] == prefill
    assert 1 <= len(data["dense"]["tokens"]) <= 6
    assert 0 <= data["agreement"] <= 6
    result = run("generate", checkpoint, *flags)
    assert result.exit_code == 0
    assert "dense" in result.stdout
    assert "tokens are the same" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_sampling_repeats_with_its_seed(run: Run, checkpoint: Path) -> None:
    flags = ["--prompt", "class", "--max-new-tokens", "6", "--temperature", "0.9", "--top-p", "0.9", "--format", "json"]
    runs = [json.loads(run("generate", checkpoint, *flags, "--seed", seed).stdout) for seed in ("3", "3")]
    assert runs[0]["sparse"]["tokens"] == runs[1]["sparse"]["tokens"]


def test_a_dense_model_is_continued_alone(run: Run, dense_model: Path) -> None:
    flags = ["--prompt", "def mean(", "--max-new-tokens", "4"]
    data = json.loads(run("generate", dense_model, *flags, "--format", "json").stdout)
    assert (data["sparse"], data["agreement"]) == (None, None)
    assert "sparse" not in run("generate", dense_model, *flags).stdout


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--max-new-tokens", "0"], "new tokens"),
        (["--max-new-tokens", "9999"], "positions"),
    ],
)
def test_bad_settings(run: Run, checkpoint: Path, flags: list[str], word: str) -> None:
    result = run("generate", checkpoint, "--prompt", "a", *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert word in result.stderr.splitlines()[-1]
