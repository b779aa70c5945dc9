"""`sparsify sweep`: the files it leaves, going on, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

Run = Any
pytest.importorskip("matplotlib")


@pytest.fixture
def flags(text_file: Path) -> list[str]:
    return ["--calibration", str(text_file), "--sequences", "4", "--seq-len", "32", "--limit", "4", "--method", "teal"]


def test_a_frontier(run: Run, dense_model: Path, tmp_path: Path, flags: list[str]) -> None:
    out = tmp_path / "sweep"
    arguments = [dense_model, "--out", out, *flags, "--max-ppl-increase", "300%"]
    result = run("sweep", *arguments, "--sparsities", "0.3,0.6")
    assert result.exit_code == 0, result.output
    assert "text.txt#held-out" in result.stdout
    assert "sparsest within 3" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    found = json.loads((out / "frontier.json").read_text())
    assert [point["sparsity"] for point in found["points"]] == [0.0, 0.3, 0.6]
    assert found["sparsest_within"] == 0.6
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "| 60.0% |" in (out / "frontier.md").read_text()
    again = run("sweep", *arguments, "--sparsities", "0.3..0.6:0.15", "--format", "json", "--no-plot")
    points = json.loads(again.stdout)["points"]
    assert [point["sparsity"] for point in points] == [0.0, 0.3, 0.45, 0.6]
    assert points[1] == found["points"][1]


BAD = {
    "sparsities": (["--sparsities", "0.8..0.3"], 2, "write 0.3..0.8"),
    "method": (["--method", "teel"], 2, "Did you mean 'teal'"),
    "allocation": (["--method", "teal@greddy"], 2, "Did you mean 'greedy'"),
    "increase": (["--max-ppl-increase", "1%%"], 2, "'1%%'"),
    "text": (["--text", "none.txt"], 2, "none.txt"),
    "table": (["--cost-table", "none/costs.json"], 2, "folder that does not exist"),
}


@pytest.mark.parametrize(("options", "code", "words"), BAD.values(), ids=BAD)
def test_bad_input(
    run: Run, dense_model: Path, tmp_path: Path, flags: list[str], options: list[str], code: int, words: str
) -> None:
    result = run("sweep", dense_model, "--out", tmp_path / "o", *flags, *options)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert words in result.stderr.splitlines()[-1]


def test_out_that_is_a_file(run: Run, dense_model: Path, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "o").write_text("")
    result = run("sweep", dense_model, "--out", tmp_path / "o", *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is a file: name a folder" in result.stderr
