"""The picture of a comparison: what is drawn, what is left out of the range, and that it is said."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import UnavailableError
from sparsify.evals.comparison_plot import check_plot, save_plot
from sparsify.evals.comparison_summary import sections

Cell = dict[str, Any]
MakeCell = Callable[..., Cell]


@pytest.fixture
def cells(make_cell: MakeCell) -> list[Cell]:
    """Two methods of two seeds; one explodes at 70% and the other is refused at 90%."""
    return [
        make_cell("dense", 0.0, 1.0, seed=None),
        *(make_cell("teal", s, nll, seed=seed) for seed in (0, 1) for s, nll in ((0.5, 1.1 + seed / 10), (0.7, 9.0))),
        *(make_cell("wina", s, nll, seed=seed) for seed in (0, 1) for s, nll in ((0.5, 1.2), (0.7, 1.4))),
        make_cell("wina", 0.9, 0.0, refused="no room"),
    ]


def _text(path: Path, monkeypatch: pytest.MonkeyPatch, cells: list[Cell]) -> str:
    """Draws cells as SVG with text as text."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    assert save_plot(sections(cells), [path])
    return path.read_text(encoding="utf-8")


def test_an_exploding_method_is_marked_and_said(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _text(tmp_path / "c.svg", monkeypatch, cells)
    for words in ("tiny, every-token, t.txt", "teal", "wina", "dense", "standard deviation", "▲ above the range"):
        assert words in text
    # e^9 = 8103 is far above 1.5 · e^1.4 = 6.1: no tick of the axis gets there.
    assert "log scale" not in text
    assert ">8000<" not in text


def test_without_one_nothing_is_said(make_cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [make_cell("dense", 0.0, 1.0, seed=None), make_cell("teal", 0.5, 1.1), make_cell("teal", 0.7, 3.0)]
    text = _text(tmp_path / "c.svg", monkeypatch, cells)
    assert "above the range" not in text
    assert "one calibration seed" in text
    assert "log scale" in text


def test_files_of_both_kinds_are_the_same_again(cells: list[Cell], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "c.png", tmp_path / "c.svg"]
    assert save_plot(sections(cells), paths)
    before = [path.read_bytes() for path in paths]
    assert before[0].startswith(b"\x89PNG")
    assert save_plot(sections(cells), paths)
    assert [path.read_bytes() for path in paths] == before


def test_an_infinite_perplexity_is_above_the_range(
    make_cell: MakeCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [make_cell("teal", 0.5, 1.1), make_cell("teal", 0.7, 800.0), make_cell("wina", 0.7, 1.3)]
    assert "above the range" in _text(tmp_path / "c.svg", monkeypatch, cells)


def test_without_results_there_is_no_picture(make_cell: MakeCell, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [make_cell("dense", 0.0, 1.0, seed=None), make_cell("wina", 0.9, 0.0, refused="no room")]
    assert not save_plot(sections(cells), [tmp_path / "c.png"])
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match=r"pip install 'sparsify-llm\[report\]', or leave it out with --no-plot"):
        check_plot()
