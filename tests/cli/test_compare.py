"""`sparsify compare`: as a user types it, stopped and gone on with, and what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsify.evals import compare_cell
from sparsify.evals.cells import read_cells
from sparsify.evals.recipe import read_recipe

Run = Any


@pytest.fixture
def flags(dense_model: Path, text_file: Path) -> list[str | Path]:
    """A comparison of the tiny model that takes seconds."""
    texts = ["--calibration", text_file, "--text", text_file]
    sizes = ["--sequences", "4", "--seq-len", "32", "--limit", "3"]
    return [dense_model, "--methods", "teal,wina", "--sparsity", "0.25,0.5", *texts, *sizes, "--no-plot"]


def test_table_and_json(run: Run, flags: list[str | Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "c.json"
    result = run("compare", *flags, "--seeds", "2", "--protocol", "every-token,decode", "--out", out)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines()[:-2])) <= 80
    assert "18/18 tiny, wina 50%, seed 1, decode: perplexity" in result.stderr
    assert len(read_cells(out)) == 18
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    for words in ("## tiny, every-token", "## tiny, decode", "| method | 25% | 50% |", "over 2 seeds", "**"):
        assert words in table
    # Nothing is left to measure: the same numbers, as JSON.
    again = run("compare", "--out", out, "--format", "json", "--no-plot")
    data = json.loads(again.stdout)
    assert [section["key"]["protocol"] for section in data["sections"]] == ["every-token", "decode"]
    entry = next(e for e in data["sections"][0]["entries"] if (e["method"], e["sparsity"]) == ("wina", 0.5))
    assert entry["perplexity"]["seeds"] == 2
    assert f"{entry['perplexity']['mean']:.3f} ± {entry['perplexity']['std']:.3f}" in table
    assert f"{entry['perplexity']['mean']:.3f}" in result.stdout
    assert out.with_suffix(".md").read_text(encoding="utf-8") == table


def test_stopped_and_gone_on_with(
    run: Run, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c.json"
    real, calls = compare_cell.convert, []

    def convert(*args: Any, **options: Any) -> Any:
        calls.append(args[1].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(compare_cell, "convert", convert)
    stopped = run("compare", *flags, "--out", out)
    assert (stopped.exit_code, len(read_cells(out))) == (130, 3)
    done = run("compare", *flags, "--out", out)
    assert done.exit_code == 0, done.output
    assert calls == ["teal", "teal", "wina", "wina", "wina"]
    assert "2/2 tiny, wina 50%" in done.stderr
    # A generation check of all of them goes into the same cells.
    more = run("compare", *flags, "--generation", "2", "--new-tokens", "8", "--out", out, "--format", "json")
    assert more.exit_code == 0, more.output
    entries = json.loads(more.stdout)["sections"][0]["entries"]
    assert all(0 <= entry["agreement"]["mean"] <= 8 for entry in entries)
    assert len(read_cells(out)) == 5


def test_the_plot_of_a_file_that_is_there(run: Run, flags: list[str | Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "c.json"
    assert run("compare", *flags, "--out", out).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "c.md"]
    result = run("compare", "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "c.md", "c.png", "c.svg"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for path in tmp_path.iterdir():
        assert f"{path}\n" in result.stdout


def test_a_recipe_runs_with_another_model_and_other_texts(
    run: Run, dense_model: Path, text_file: Path, tmp_path: Path
) -> None:
    here = [dense_model, "--calibration", text_file, "--text", text_file, "--seq-len", "32", "--sequences", "4"]
    few = ["--limit", "2", "--sparsity", "0.5", "--no-plot", "--out", tmp_path / "c.json"]
    result = run("compare", *here, "--recipe", "llama-2-7b-wikitext2", *few)
    assert result.exit_code == 0, result.output
    keys = [cell["key"] for cell in read_cells(tmp_path / "c.json")]
    assert {(key["model"], key["text"], key["protocol"]) for key in keys} == {
        ("tiny", "text.txt", "every-token"), ("tiny", "text.txt", "decode"),
    }  # fmt: skip
    assert {key["method"] for key in keys} == {"dense", *read_recipe("llama-2-7b-wikitext2").methods}


@pytest.mark.parametrize("own_model", [False, True])
def test_a_recipe_without_the_hub_is_one_clear_error(
    run: Run, dense_model: Path, tmp_path: Path, own_model: bool
) -> None:
    if own_model:
        pytest.importorskip("datasets")
    model = [dense_model] if own_model else []
    result = run("compare", *model, "--recipe", "llama-3-8b-wikitext2", "--no-plot", "--out", tmp_path / "c.json")
    assert result.exit_code == 4
    words = "wikitext-2-raw-v1:test' cannot be loaded"
    if not own_model:
        words = "the hub was not reached and meta-llama/Meta-Llama-3-8B is not in the local cache"
    assert words in result.stderr
    assert result.stderr.count("error: ") == 1
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_nothing_is_begun(
    run: Run, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("compare", *flags, "--plot", "--out", tmp_path / "c.json")
    assert result.exit_code == 4
    assert "leave it out with --no-plot" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "c.txt"], "the name must end in .json"),
        (["--out", "c.json"], "no MODEL and no --recipe, and c.json does not exist"),
        (["reference", "--out", "c.json", "--methods", "teel"], "unknown method 'teel'"),
        (["reference", "--out", "c.json", "--methods", "teal@gredy"], "unknown allocation 'gredy'"),
        (["reference", "--out", "c.json", "--sparsity", "0.5,half"], "--sparsity 0.5,half: give numbers in [0, 1)"),
        (["reference", "--out", "c.json", "--sparsity", "1.5"], "1.5"),
        (["reference", "--out", "c.json", "--protocol", "decod"], "unknown protocol 'decod'"),
        (["reference", "--out", "c.json", "--seeds", "0"], "at least 1, not 0"),
        (["refrence", "--out", "c.json"], "Did you mean 'reference'?"),
        (["--recipe", "llama-2-7b", "--out", "c.json"], "Did you mean 'llama-2-7b-wikitext2'?"),
    ],
)
def test_bad_input(run: Run, arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("compare", *arguments, "--no-plot")
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("error: ") == 1
    assert not list(tmp_path.iterdir())
