"""The picture of a comparison: it is drawn, and what cannot be drawn is refused before anything is measured."""

import sys
from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals.speed_plot import check_plot, save_plot


def _side(median: float, *, sparse: bool) -> dict[str, Any]:
    return {
        "sparse": sparse,
        "ms_per_step": {"median": median, "p10": 0.9 * median, "p90": 1.2 * median},
        "limit_ms": 0.8 * median,
        "touched": {"realised_sparsity": 0.5 * sparse},
    }


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_picture_is_written(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"speed.{suffix}"
    check_plot(path)
    result = {
        "title": "tiny, teal", "dtype": "bfloat16", "batch": 1, "prompt_tokens": 8, "cpu": "a processor", "threads": 2,
        "sides": {"sparse": _side(1.0, sparse=True), "dense": _side(2.0, sparse=False)},
    }  # fmt: skip
    save_plot(result, path)
    assert path.stat().st_size > 1000
    if suffix == "png":
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["plot.txt", "plot", "missing/plot.png", "folder"])
def test_a_file_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SparsifyError, match="--plot"):
        check_plot(tmp_path / name)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match=r"pip install 'sparsify-llm\[report\]'"):
        check_plot(tmp_path / "plot.png")
