"""What users get wrong: one error line, the right exit code, no traceback, nothing left behind."""

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Run = Any
BAD_OPTIONS = {
    "unknown method": (["--method", "rspars"], 2, ["rspars", "Did you mean 'rsparse'"]),
    "sparsity one": (["--sparsity", "1"], 2, ["sparsity", "[0, 1)"]),
    "sparsity negative": (["--sparsity", "-0.1"], 2, ["sparsity", "[0, 1)"]),
    "sparsity percent": (["--sparsity", "50"], 2, ["Did you mean 0.5"]),
    "sparsity nan": (["--sparsity", "nan"], 2, ["sparsity", "[0, 1)"]),
    "sparsity word": (["--sparsity", "half"], 2, ["--sparsity", "number"]),
    "rho above one": (["--method", "rsparse", "--rho", "1.5"], 2, ["rho", "[0, 1]"]),
    "rho nan": (["--method", "rsparse", "--rho", "nan"], 2, ["rho", "[0, 1]"]),
    "rho word": (["--method", "rsparse", "--rho", "much"], 2, ["rho", "much", "auto"]),
    "rho for teal": (["--method", "teal", "--rho", "0.9"], 2, ["teal", "rho"]),
    "rho without its method": (["--rho", "0.9"], 2, ["auto takes no option 'rho'", "rsparse does"]),
    "unknown score": (["--method", "rsparse", "--score", "columns"], 2, ["columns", "column-norm"]),
    "unknown allocation": (["--allocation", "greddy"], 2, ["greddy", "Did you mean 'greedy'"]),
    "no room for a rank": (["--method", "rsparse", "--sparsity", "0.5", "--rho", "0.999"], 2, ["rank"]),
    "no recipe": (["--method", "rsparse", "--recipe", "none.json"], 2, ["none.json"]),
    "two budgets": (["--sparsity", "0.5", "--speedup", "1.5"], 2, ["--sparsity 0.5 and --speedup 1.5", "exactly one"]),
    "increase twice percent": (["--max-ppl-increase", "1%%"], 2, ["'1%%'", "such as 1% or 0.01"]),
    "increase zero": (["--max-ppl-increase", "0%"], 2, ["'0%'", "above 0"]),
    "increase negative": (["--max-ppl-increase", "-1%"], 2, ["'-1%'", "above 0"]),
    "increase without percent": (["--max-ppl-increase", "5"], 2, ["Did you mean 5%"]),
    "speedup below one": (["--speedup", "0.9"], 2, ["speedup is 0.9", "above 1"]),
    "speedup nan": (["--speedup", "nan"], 2, ["speedup is nan", "above 1"]),
    "speedup without kernels": (["--speedup", "1.5", "--method", "topk"], 2, ["topk", "no kernel"]),
    "held out without its budget": (["--held-out", "8"], 2, ["--held-out is for --max-ppl-increase"]),
    "held-out text too short": (["--max-ppl-increase", "1%", "--held-out", "9999"], 2, ["9999", "--held-out"]),
    "cost table without its budget": (["--cost-table", "c.json"], 2, ["--cost-table is for --speedup"]),
    "recipe with a quality": (["--recipe", "r.json", "--max-ppl-increase", "1%"], 2, ["--recipe", "give one"]),
    "state without its search": (["--allocation-state", "s.json"], 2, ["--allocation-state", "evolutionary"]),
    "unknown dtype": (["--dtype", "int8"], 2, ["int8", "bfloat16"]),
    "unknown device": (["--device", "cudda"], 2, ["cudda", "Did you mean 'cuda'"]),
    "unknown text": (["--calibration", "wikitxt2"], 2, ["wikitxt2", "Did you mean 'wikitext2'"]),
    "no text file": (["--calibration", "none.txt"], 2, ["none.txt"]),
    "text too short": (["--sequences", "100000"], 2, ["100000", "--sequences"]),
    "window too long": (["--seq-len", "512", "--sequences", "1"], 2, ["512", "256"]),
    "no sequences": (["--sequences", "0"], 2, ["sequences"]),
    "windows below zero": (["--eval-windows", "-1"], 2, ["eval_windows"]),
    "no tokens": (["--seq-len", "0"], 2, ["seq_len"]),
    "unknown option": (["--sparsty", "0.5"], 2, ["--sparsty", "--sparsity"]),
    "no such file": (["--config", "none.yaml"], 2, ["none.yaml"]),
    "no folder for --save": (["--save", "none/x.json"], 2, ["none/x.json"]),
}


def expect_error(result: Any, code: int, words: list[str]) -> None:
    """Checks for one line of error with these words, after nothing but log lines."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[-1]


@pytest.mark.parametrize(("flags", "code", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_of_convert(
    run: Run, dense_model: Path, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    flags: list[str], code: int, words: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    expect_error(run("convert", dense_model, "--out", "out", *quick, *flags), code, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["convert", "eval", "generate", "bench", "inspect"])
def test_unknown_models(run: Run, command: str, tmp_path: Path) -> None:
    needed = {"convert": ["--out", tmp_path / "out"], "generate": ["--prompt", "a"], "eval": ["--text", __file__]}
    for model, words in (
        ("llama-3-8", ["Did you mean 'llama-3-8b'"]),
        (tmp_path, ["config.json"]),
        (__file__, ["is a file"]),
        (tmp_path / "none", ["none"]),
    ):
        expect_error(run(command, model, *needed.get(command, [])), 2, words)
    assert list(tmp_path.iterdir()) == []


def test_unreachable_hub_models(run: Run) -> None:
    expect_error(
        run("eval", "owner/name-of-nothing", "--text", "stdlib:evaluation"), 4, ["owner/name-of-nothing", "hub"]
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ["empty"]), (b" \n\n", ["empty"]), (b"caf\xe9", ["UTF-8", "iconv"]), (b"two words", ["short", "--seq-len"])],
    ids=["empty", "blank", "latin-1", "short"],
)
def test_bad_texts(run: Run, dense_model: Path, tmp_path: Path, content: bytes, words: list[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    expect_error(
        run("eval", dense_model, "--text", text, "--seq-len", "128"), 2, words[:1] if len(words) > 1 else words
    )
    result = run("convert", dense_model, "--out", tmp_path / "out", "--calibration", text, "--seq-len", "128")
    expect_error(result, 2, words[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_existing_output_is_kept(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("out", "file", "link"):
        expect_error(run("convert", dense_model, "--out", tmp_path / name, *quick), 2, [name, "exists"])
    expect_error(run("convert", dense_model, "--out", tmp_path / "file" / "deep", *quick), 2, ["file", "not a folder"])
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "out"]


def test_what_is_missing_is_named(run: Run, dense_model: Path, tmp_path: Path) -> None:
    expect_error(run("convert", dense_model), 2, ["--out"])
    expect_error(run("convert", "--out", tmp_path / "out"), 2, ["MODEL"])
    expect_error(run("generate", dense_model), 2, ["--prompt"])


def test_unknown_keys_in_the_settings(run: Run, dense_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("sparsty: 0.5\n")
    result = run("convert", dense_model, "--out", tmp_path / "out", "--config", file)
    expect_error(result, 2, ["sparsty", "Did you mean 'sparsity'", str(file)])


@pytest.mark.parametrize("command", ["eval", "generate", "bench"])
def test_unknown_backend(run: Run, checkpoint: Path, dense_model: Path, text_file: Path, command: str) -> None:
    needed = {"generate": ["--prompt", "a"], "eval": ["--text", text_file, "--seq-len", "32"]}.get(command, [])
    expect_error(run(command, checkpoint, "--backend", "referense", *needed), 2, ["referense", "'reference'"])
    expect_error(run(command, dense_model, "--backend", "reference", *needed), 2, ["--backend", "dense model"])


def test_mistyped_commands_and_options_get_a_suggestion(run: Run) -> None:
    expect_error(run("methods", "--formt", "json"), 2, ["--formt", "--format"])
    expect_error(run("evl"), 2, ["evl", "eval"])


def test_a_missing_gpu_is_no_bad_input(run: Run, dense_model: Path, quick: list[str], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = run("convert", dense_model, "--out", tmp_path / "out", "--device", "cuda", *quick)
    expect_error(result, 4, ["cuda", "sparsify doctor"])


def test_a_full_disk_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "big.json")

    monkeypatch.setattr("sparsify.methods.available", fail)
    expect_error(run("methods"), 4, ["no space left", "big.json"])


def test_an_interruption_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsify.methods.available", interrupt)
    expect_error(run("methods"), 130, ["interrupted"])


def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("sparsify.methods.available", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("methods")


def test_as_a_user_types_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparsify.cli.main", "convert", "referense", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown model 'referense'")
    assert "Did you mean 'reference'" in done.stderr
    assert done.stderr.count("\n") == 1
