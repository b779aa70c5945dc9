"""`sparsify bench`: what was measured, and plain sentences about it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from sparsify.cli.bench_view import busy_note, cache_note, statements
from sparsify.evals import cold_calls, crossover, sides, stream
from sparsify.evals.shapes import SHAPES
from sparsify.kernels import library

Run = Any
_QUICK = ["--rounds", "2", "--new-tokens", "4", "--prompt-tokens", "8"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of 64 kB, two copies of each weight, and a shape that is made in no time."""
    monkeypatch.setattr(stream, "_LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(stream, "cache_of", lambda device: None)
    monkeypatch.setattr(cold_calls, "last_level_cache", lambda: None)
    values = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    monkeypatch.setitem(SHAPES, "tiny", (LlamaConfig, values))


def test_all_sides_are_measured(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    result = run("bench", checkpoint, *_QUICK, "--save", tmp_path / "bench.json")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["rounds"] == 2
    assert data["method"] == "rsparse"
    assert data["left_out"] == {}
    assert {"sparse", "dense", "transformers"} <= set(data["sides"])
    assert " ".join(data["statement"].split()[:2]) in result.stdout
    for name, side in data["sides"].items():
        assert name in result.stdout
        assert f"{side['tokens_per_second']:.1f}" in result.stdout


def test_a_dense_model_has_no_sparse_side(run: Run, dense_model: Path) -> None:
    result = run("bench", dense_model, *_QUICK)
    assert result.exit_code == 0, result.output
    assert "sparse  " not in result.stdout
    assert "faster here" not in result.stdout
    assert "random" not in result.stdout


def test_no_hf_loads_no_second_copy(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.models.load_dense", None)
    data = json.loads(run("bench", checkpoint, *_QUICK, "--no-hf", "--format", "json").stdout)
    assert set(data["sides"]) == {"sparse", "dense"}
    assert data["left_out"] == {"transformers": "--no-hf"}


def test_short_memory_leaves_the_second_copy_out(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "available_memory", lambda device: 1 << 20)
    result = run("bench", checkpoint, *_QUICK)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "transformers is left out: a second copy of the weights in row-major layout needs 1.1 GB" in said
    assert "0.0 GB are there" in said


def test_several_sparsities_of_a_shape(run: Run) -> None:
    shape = ["--shape", "tiny", "--sparsity", "0.5", "--sparsity", "0.8"]
    result = run("bench", *shape, *_QUICK)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "The weights are random" in result.stdout
    data = json.loads(run("bench", *shape, *_QUICK, "--format", "json").stdout)
    assert {"sparse-50", "sparse-80", "dense", "transformers"} <= set(data["sides"])
    assert data["random_weights"]
    assert (data["shape"], data["model"], data["method"]) == ("tiny", None, "teal")
    assert data["sides"]["sparse-80"]["touched"]["nominal_sparsity"] == 0.8
    # A sentence for each.
    assert len(statements(data)) == 2


def test_a_plot_is_drawn(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("bench", checkpoint, *_QUICK, "--plot", tmp_path / "bench.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize("what", ["checkpoint", "shape"])
def test_the_crossover_is_a_table(what: str, run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "BATCHES", (1, 4))
    subject = [checkpoint] if what == "checkpoint" else ["--shape", "tiny"]
    result = run("bench", *subject, "--crossover")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "4 tokens at once:" in result.stdout
    data = json.loads(run("bench", *subject, "--crossover", "--format", "json").stdout)
    assert len(data["cells"]) % 5 == 0
    for cell in data["cells"]:
        assert cell["faster"] in ("sparse", "dense", "neither")
    assert data["linear"].startswith("model.layers.")


def _measured(ratio: tuple[float, float, float], backends: list[str], fits: tuple[bool, bool]) -> dict[str, Any]:
    spread = dict(zip(("median", "p10", "p90"), ratio, strict=True))
    touched = {"bytes_per_step": 5e6, "realised_sparsity": 0.48}
    return {
        "sides": {
            "sparse": {"sparse": True, "touched": touched, "fits_in_cache": fits[0]},
            "dense": {"sparse": False, "touched": touched | {"bytes_per_step": 1e7}, "fits_in_cache": fits[1]},
        },
        "ratios": {"sparse": {"dense": spread}},
        "best_dense": "dense",
        "backends": backends,
        "last_level_cache_bytes": 2e7,
    }


@pytest.mark.parametrize(
    ("ratio", "backends", "words"),
    [
        ((0.7, 0.6, 0.8), ["reference"], ["Dense is faster", "0.70×", "0.60 to 0.80", "reads every weight byte"]),
        ((0.7, 0.6, 0.8), ["native"], ["Dense is faster", "0.70×"]),
        ((1.0, 0.9, 1.1), ["native"], ["No clear difference", "within the spread"]),
        ((1.6, 1.5, 1.7), ["native"], ["Sparse at 48% is faster", "1.60×", "the fastest dense side, dense"]),
    ],
)
def test_statement(ratio: tuple[float, float, float], backends: list[str], words: list[str]) -> None:
    (said,) = statements(_measured(ratio, backends, (False, False)))
    assert all(word in said for word in words)
    assert said.endswith(".")
    assert ("reference" in said) == (backends == ["reference"])


@pytest.mark.parametrize(
    ("fits", "words"),
    [
        (
            (True, True),
            ["The weights that a step touches (10.0 MB) fit in the last-level cache of 20.0 MB", "not of memory"],
        ),
        ((True, False), ["Only the weights of sparse (5.00 MB) fit", "larger than those"]),
        ((False, False), []),
        ((None, None), []),
    ],
)
def test_weights_in_the_cache_are_said_to_be(fits: Any, words: list[str]) -> None:
    note = cache_note(_measured((1.6, 1.5, 1.7), ["native"], fits))
    assert (note is None) == (not words)
    assert all(word in str(note) for word in words)


@pytest.mark.parametrize(("waited", "said"), [(None, False), (0.01, False), (0.4, True)])
def test_a_busy_machine_is_said_to_be(waited: float | None, said: bool) -> None:
    note = busy_note({"waited_for_cpu": waited})
    assert (note is not None) == said
    assert not said or "waited 0.40 s for a CPU" in str(note)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a MODEL, or --shape NAME"),
        (["MODEL", "--shape", "tiny"], "not both"),
        (["MODEL", "--sparsity", "0.5"], "--sparsity is for --shape"),
        (["MODEL", "--method", "teal"], "--method is for --shape"),
        (["--shape", "tyny"], "Did you mean 'tiny'?"),
        (["--shape", "tiny", "--sparsity", "1.5"], "1.5"),
        (["--shape", "tiny", "--method", "wina", "--sparsity", "0.5", "--sparsity", "0.7"], "one --sparsity"),
        (["--shape", "tiny", "--device", "gpu"], "'gpu' is not a device"),
        (["MODEL", "--rounds", "0"], "greater than or equal to 1"),
        (["MODEL", "--new-tokens", "9999", "--prompt-tokens", "8"], "positions"),
        (["MODEL", "--plot", "plot.txt"], ".png, .svg or .pdf"),
        (["MODEL", "--plot", "plot.png", "--crossover"], "leave it or --crossover out"),
    ],
)
def test_bad_input(arguments: list[str], words: str, run: Run, checkpoint: Path) -> None:
    result = run("bench", *(checkpoint if argument == "MODEL" else argument for argument in arguments))
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]


def test_the_crossover_needs_the_native_kernels(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing", lambda: "the native CPU kernels are not built: do this")
    result = run("bench", checkpoint, "--crossover")
    assert result.exit_code == 4
    assert "not built: do this" in result.stderr
