"""Several processes that do one piece of work: their shares, and how what they found is put together."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.errors import SparsifyError
from sparsify.evals.cells import CellFile, part_of, read_cells, take_parts
from sparsify.processes import ONE, Processes, WindowSums


def test_cells_of_a_run_that_was_stopped_are_taken(tmp_path: Path) -> None:
    out = tmp_path / "cells.json"
    cells = [{"key": {"number": number}, "refused": "no"} for number in range(5)]
    CellFile(out).put(cells[2])
    CellFile(part_of(out, 0)).put(cells[3])
    CellFile(part_of(out, 1)).put(cells[1])
    CellFile(part_of(out, 1)).put(cells[4])
    take_parts(CellFile(out), [cells[1]["key"], cells[0]["key"]])
    assert [cell["key"]["number"] for cell in read_cells(out)] == [2, 1, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["cells.json"]


class _Second(Processes):
    """The second of two processes, without the first, which has given what `first` holds."""

    given: Any = None

    def gathered(self, own: Any) -> list[Any]:
        return [type(self).given, own]


def test_sums_are_in_the_order_of_the_windows() -> None:
    values = torch.tensor([1.0, 1e16, -1e16, 3.0], dtype=torch.float64)
    whole: WindowSums[str] = WindowSums(ONE)
    for value in values:
        whole.add("x", value)
    expected = 0.0
    for value in values.tolist():
        expected += value
    assert float(whole.totals()["x"]) == expected != float(values.flip(0).cumsum(0)[-1])
    process = _Second(1, 2)
    assert process.part(values).tolist() == values[2:].tolist()
    _Second.given = {"x": values[:2]}
    half: WindowSums[str] = WindowSums(process)
    for value in process.part(values):
        half.add("x", value)
    assert float(half.totals()["x"]) == expected


def test_every_window_is_of_one_process() -> None:
    windows = torch.arange(7)
    for count in (1, 2, 3, 7, 9):
        assert torch.cat([Processes(index, count).part(windows) for index in range(count)]).tolist() == list(range(7))


def test_processes_that_differ_are_refused() -> None:
    _Second.given = "'a'"
    _Second(1, 2).agree("a", "candidates")
    with pytest.raises(SparsifyError, match="different candidates: they must run on devices of one kind"):
        _Second(1, 2).agree("b", "candidates")
