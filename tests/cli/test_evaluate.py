"""`sparsify eval`: dense and sparse on the same tokens, and the same numbers in both formats."""

import json
from pathlib import Path
from typing import Any

import pytest

Run = Any


@pytest.fixture
def flags(text_file: Path) -> list[str]:
    return ["--text", str(text_file), "--seq-len", "32", "--limit", "4"]


@pytest.mark.parametrize("protocol", ["every-token", "decode"])
def test_dense_and_sparse_on_the_same_tokens(run: Run, checkpoint: Path, flags: list[str], protocol: str) -> None:
    data = json.loads(run("eval", checkpoint, *flags, "--protocol", protocol, "--format", "json").stdout)
    entry = data["models"][0]
    assert (entry["dense"]["sparse"], entry["sparse"]["sparse"]) == (False, True)
    for key in ("tokens", "text_sha256", "protocol", "seq_len", "windows"):
        assert entry["dense"][key] == entry["sparse"][key]
    assert entry["dense"]["perplexity"] != entry["sparse"]["perplexity"]
    assert entry["nominal_sparsity"] == 0.5
    assert entry["weighted_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert entry["realised_sparsity"] == pytest.approx(0.5, abs=0.2)
    assert entry["touched_bytes_per_token"] < entry["dense_bytes_per_token"]


def test_the_dense_side_is_the_dense_model(run: Run, checkpoint: Path, dense_model: Path, flags: list[str]) -> None:
    data = json.loads(run("eval", checkpoint, dense_model, *flags, "--format", "json").stdout)
    converted, plain = data["models"]
    assert converted["dense"]["nll_per_token"] == pytest.approx(plain["dense"]["nll_per_token"], rel=1e-5)
    assert "sparse" not in plain


def test_only_dense(run: Run, checkpoint: Path, flags: list[str]) -> None:
    data = json.loads(run("eval", checkpoint, "--dense", *flags, "--format", "json").stdout)
    assert "sparse" not in data["models"][0]


def test_human_output_fits_and_is_saved_as_json(
    run: Run, checkpoint: Path, dense_model: Path, flags: list[str], tmp_path: Path
) -> None:
    result = run("eval", checkpoint, dense_model, *flags, "--save", tmp_path / "eval.json")
    assert result.exit_code == 0, result.output
    assert "protocol every-token" in " ".join(result.stdout.split()).lower()
    assert max(map(len, result.stdout.splitlines())) <= 80
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert f"{saved['models'][0]['sparse']['perplexity']:.3f}" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_without_a_text_the_standard_library_stands_in(run: Run, dense_model: Path) -> None:
    result = run("eval", dense_model, "--seq-len", "32", "--limit", "2", "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["models"][0]["dense"]["text"] == "stdlib:evaluation"
    assert "stdlib:evaluation" in data["text"]


def test_windows_are_as_long_as_the_model_allows(run: Run, dense_model: Path, text_file: Path) -> None:
    data = json.loads(run("eval", dense_model, "--text", text_file, "--limit", "1", "--format", "json").stdout)
    assert data["models"][0]["dense"]["seq_len"] == 256
