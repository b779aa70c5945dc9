"""Commands that several processes run together: what one process writes, byte for byte.

One launch of two processes runs all the commands; so does this process, alone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsify.evals.cells import read_cells

# The launch takes two processes' imports and conversions.
pytestmark = pytest.mark.slow
_SCRIPT = Path(__file__).parents[1] / "parallel" / "commands.py"
CONVERSIONS = {
    "rsparse": ["--method", "rsparse"],
    "compensated": ["--method", "wina", "--compensate"],
    "cats": ["--method", "cats", "--sparsity", "0.3"],
    "larosa": ["--method", "larosa"],
    "sensitivity": ["--method", "teal", "--allocation", "sensitivity"],
    "to-a-quality": ["--method", "teal", "--max-ppl-increase", "5%", "--held-out", "2"],
}
REFUSED = {
    "speed": (
        ["convert", "MODEL", "--speedup", "1.5", "--out", "none"],
        "--speedup is for one process, and 2 are here",
    ),
    "eval": (["eval", "MODEL"], "sparsify eval runs in one process, and a launcher has started 2"),
    "costs": (["sweep", "MODEL", "--out", "none", "--cost-table", "none.json"], "measure it with one process first"),
}


def _commands(dense_model: Path, text_file: Path) -> list[list[str]]:
    text = ["--calibration", str(text_file), "--sequences", "5", "--seq-len", "32"]
    commands = [
        ["convert", str(dense_model), "--out", name, *text, "--eval-windows", "2", *flags]
        for name, flags in CONVERSIONS.items()
    ]
    short = ["--calibration", str(text_file), "--sequences", "4", "--seq-len", "32", "--limit", "3", "--no-plot"]
    commands.append(
        ["sweep", str(dense_model), "--out", "sweep", *short, "--method", "teal", "--sparsities", "0.3,0.4,0.6"]
    )
    commands.append(
        ["compare", str(dense_model), "--out", "cells.json", *short, "--text", str(text_file), "--methods", "teal,wina",
         "--sparsity", "0.4,0.6", "--protocol", "every-token,decode", "--format", "json"]
    )  # fmt: skip
    commands += [[str(dense_model) if part == "MODEL" else part for part in command] for command, _ in REFUSED.values()]
    return commands


@pytest.fixture(scope="module")
def commands(dense_model: Path, text_file: Path) -> list[list[str]]:
    return _commands(dense_model, text_file)


@pytest.fixture(scope="module")
def together(commands: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes have written."""
    out = tmp_path_factory.mktemp("together")
    (out / "commands.json").write_text(json.dumps(commands))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, str(_SCRIPT), str(out / "commands.json"), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def alone(app: Any, commands: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of what one process has written."""
    out, before = tmp_path_factory.mktemp("alone"), Path.cwd()
    os.chdir(out)
    for command in commands[: -len(REFUSED)]:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    os.chdir(before)
    return out


def _said(folder: Path, process: int, command: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{process}.json").read_text())[command]
    return found


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_checkpoint_is_the_same_byte_for_byte(name: str, together: Path, alone: Path) -> None:
    files = {path.name for path in (alone / name).iterdir()}
    assert "model.safetensors" in files
    assert {path.name for path in (together / name).iterdir()} == files
    for file in files:
        assert (together / name / file).read_bytes() == (alone / name / file).read_bytes(), file


def test_the_first_process_speaks(together: Path) -> None:
    for command in range(len(CONVERSIONS) + 2):
        first, second = (_said(together, process, command) for process in (0, 1))
        assert (first["exit_code"], second["exit_code"]) == (0, 0)
        assert "rote" in first["stdout"] or first["stdout"].startswith("{")
        assert (second["stdout"], second["stderr"]) == ("", "")


def _timeless(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for cell in cells:
        cell["result"] = {k: v for k, v in cell["result"].items() if k not in ("seconds", "convert_seconds")}
    return cells


def test_a_sweep_is_the_same(together: Path, alone: Path) -> None:
    files = sorted(path.name for path in (alone / "sweep").iterdir())
    assert files[1:] == ["frontier.json", "frontier.md"]
    assert sorted(path.name for path in (together / "sweep").iterdir()) == files
    for file in files[1:]:
        assert (together / "sweep" / file).read_bytes() == (alone / "sweep" / file).read_bytes()
    cells = [_timeless(read_cells(folder / "sweep" / files[0])) for folder in (together, alone)]
    assert len(cells[0]) == 4
    assert cells[0] == cells[1]


def test_a_comparison_is_the_same(together: Path, alone: Path) -> None:
    cells = [_timeless(read_cells(folder / "cells.json")) for folder in (together, alone)]
    assert len(cells[0]) == 10
    assert cells[0] == cells[1]
    assert (together / "cells.md").read_text() == (alone / "cells.md").read_text()
    assert list(together.glob("cells.json.part-*")) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_process_must_do_is_refused(name: str, together: Path) -> None:
    command = len(CONVERSIONS) + 2 + list(REFUSED).index(name)
    for process in (0, 1):
        said = _said(together, process, command)
        assert (said["exit_code"], said["stdout"]) == (2, "")
        start = "error in process 1: " if process else "error: "
        last = said["stderr"].splitlines()[-1]
        assert last.startswith(start)
        assert REFUSED[name][1] in last
    assert not (together / "none").exists() or list((together / "none").iterdir()) == []
