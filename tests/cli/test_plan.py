"""`sparsify plan`, which is `sparsify convert --dry-run`: what it says, its exit code, and that it reads no weight."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from sparsify.cli.convert import convert
from sparsify.cli.plan import plan
from sparsify.svd_cost import Rates

Run = Any
LLAMA_2_7B: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> Rates:
    """The speed of some machine: measuring this one takes seconds in every test."""
    some = Rates(1e11, 1e11, 5e10, 2e10, 2e10, 1e9, 2e8, 1e9)
    monkeypatch.setattr("sparsify.evals.rates.measure_rates", lambda device, dtype, tokens: some)
    return some


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, header_only: Callable[..., Path]) -> Path:
    """A folder of Llama-2-7B's shape with headers alone and no tokenizer."""
    return header_only(tmp_path_factory.mktemp("large") / "llama", LlamaConfig(**LLAMA_2_7B), shards=3)


def planned(run: Run, *arguments: str | Path) -> dict[str, Any]:
    result = run("plan", *arguments, "--format", "json")
    assert result.exit_code in (0, 1), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_it_takes_every_option_of_convert() -> None:
    assert set(inspect.signature(convert).parameters) - set(inspect.signature(plan).parameters) == {"dry_run"}


def test_it_is_the_dry_run(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    flags = [dense_model, "--method", "rsparse", "--out", tmp_path / "o", *quick]
    found = planned(run, *flags)
    again = json.loads(run("convert", *flags, "--dry-run", "--format", "json").stdout)
    for data in (found, again):
        # What depends on the process and the moment.
        del data["memory"], data["time"], data["checkpoint"]["disk_free"]
    assert found == again
    assert found["unread"] is None
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("method", ["teal", "wina", "rsparse --rho 0.8", "larosa", "cats --sparsity 0.3", "relu+teal"])
def test_the_sizes_are_what_convert_writes(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str], method: str
) -> None:
    if method == "relu+teal":
        out = tmp_path / "relufied"
        assert run("convert", dense_model, "--method", "relufy", "--plain", "--out", out, *quick).exit_code == 0
        dense_model = out
    flags = [dense_model, "--method", *method.split(), "--out", tmp_path / "o", *quick]
    found = planned(run, *flags)["checkpoint"]
    assert found["exact"]
    assert run("convert", *flags).exit_code == 0
    weights = (tmp_path / "o" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    assert len(weights) - header == found["tensor_bytes"][1]
    total = sum(path.stat().st_size for path in (tmp_path / "o").iterdir())
    assert found["bytes"][1] == pytest.approx(total, rel=0.05)


def test_a_large_model_without_a_tokenizer_is_planned(run: Run, large: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_blocks for path in large.iterdir()}
    found = planned(run, large, "--method", "rsparse", "--rho", "0.95", "--out", tmp_path / "o")
    assert found["linears"] == 224
    assert found["parameters"]["all"] == 6_738_415_616
    assert found["checkpoint"]["dense_bytes"] == 2 * 6_738_415_616
    assert found["checkpoint"]["exact"]
    assert "tokenizer" in found["unread"]
    assert found["memory"]["peak"] > found["memory"]["weights"] == 2 * 6_738_415_616
    # A block of 7B has 405 MB.
    assert 2 * 404e6 < found["memory"]["streamed_peak"] < 5e9
    low, high = found["time"]["range"]
    assert low < found["time"]["seconds"] < high
    assert {path: path.stat().st_blocks for path in large.iterdir()} == before


@pytest.mark.parametrize("method", ["rsparse", "auto"])
def test_what_does_not_fit_is_said_with_what_helps(
    run: Run, large: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("sparsify.evals.machine.available_memory", lambda device: 8 << 30)
    result = run("plan", large, "--method", method)
    said = " ".join(result.stdout.split())
    assert result.exit_code == 1
    assert "It does not fit here." in said
    assert "8.59 GB are available on this machine" in said
    assert ("With --stream it takes one block at a time" if method == "rsparse" else "It cannot be streamed") in said


def test_a_streamed_conversion_is_planned_as_one(
    run: Run, large: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sparsify.evals.machine.available_memory", lambda device: 8 << 30)
    found = planned(run, large, "--method", "rsparse", "--stream", "--out", tmp_path / "o")
    assert found["verdict"]["memory_fits"]
    # Hidden states before and after a block: 32 windows to calibrate and twice 8 to measure, of 512 tokens.
    assert found["checkpoint"]["while_streaming"] == 2 * 48 * 512 * 4096 * 2
    for method in ("auto", "cats", "relufy"):
        result = run("plan", large, "--method", method, "--stream")
        assert result.exit_code == 2
        assert "--stream" in result.stderr


def test_a_full_disk_is_said(run: Run, large: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Usage:
        free = 1 << 30

    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage())
    monkeypatch.setattr("sparsify.evals.machine.available_memory", lambda device: 1 << 40)
    result = run("plan", large, "--method", "teal", "--out", tmp_path / "o")
    assert result.exit_code == 1
    assert "of disk and 1.07 GB are free" in " ".join(result.stdout.split())


@pytest.mark.parametrize("method", ["teal", "auto", "relufy", "griffin --sparsity 0.3"])
def test_tables_fit_a_terminal(run: Run, dense_model: Path, quick: list[str], method: str) -> None:
    result = run("plan", dense_model, "--method", *method.split(), *quick)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "It fits here." in result.stdout
    assert "nothing was written" in " ".join(result.stdout.split())


def test_ppl_p_is_planned_by_its_mlps(run: Run, dense_model: Path, quick: list[str]) -> None:
    found = planned(run, dense_model, "--method", "ppl-p", "--max-ppl-increase", "1%", "--held-out", "2", *quick)
    # Two downs of 128 inputs, a threshold and scales each.
    assert found["checkpoint"]["added_bytes"] == [2 * 4 + 2 * 128 * 4] * 2
    assert found["time"]["not_counted"] == ["the search of method ppl-p"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method teal --sparsity 1.5", "sparsity is 1.5"),
        ("--method rsparse --svd fast", "unknown svd 'fast'"),
        ("--method teal --svd exact", "takes no option 'svd'"),
        ("--method wina --sparsity 0.99", "leaves"),
        ("--sequences 100000", "--sequences"),
        ("--method relu", "method relu needs MLPs with ReLU"),
    ],
)
def test_errors_are_the_conversions(run: Run, dense_model: Path, quick: list[str], flags: str, words: str) -> None:
    result = run("plan", dense_model, *quick, *flags.split())
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
