"""TEAL's kernel beside ours, with a product of our own in the place of its code. Times are made up."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from sparsify.errors import SparsifyError
from sparsify.evals.gpu_bench import Bench
from sparsify.evals.gpu_timing import Site
from sparsify.evals.teal_kernel import load_teal, teal_speed

WriteTeal = Callable[..., Path]


def side(found: dict[str, Any], form: str, sparsity: float) -> dict[str, Any]:
    (one,) = [s for s in found["sides"] if (s["form"], s["sparsity"]) == (form, sparsity)]
    return dict(one)


def test_teal_beside_ours(cpu_bench: Bench, write_teal: WriteTeal) -> None:
    before = list(sys.path), set(sys.modules)
    teal = load_teal(write_teal("assert weight.stride(1) > 1 and 40 <= sparsity_bin <= 60"))
    assert (list(sys.path), set(sys.modules)) == before
    found = teal_speed(cpu_bench, Site("down", 128, (32, 64), gated=True), teal)
    assert {s["form"] for s in found["sides"]} == {"masked", "indexed", "TEAL"}
    assert {s["sparsity"] for s in found["sides"]} == {0.4, 0.5, 0.6}
    # Turns three to nine are of 50 and 60%.
    assert side(found, "masked", 0.5)["over_teal"]["median"] == pytest.approx(6 / 4)
    assert side(found, "TEAL", 0.6)["over_teal"]["median"] == 1.0


@pytest.mark.parametrize(
    ("body", "words"),
    [("raise RuntimeError('no such GPU')", "RuntimeError: no such GPU"), ("return 0 * x @ weight.t()", "wrong by 1.0")],
)
def test_a_failure_of_teal_is_recorded(cpu_bench: Bench, write_teal: WriteTeal, body: str, words: str) -> None:
    found = teal_speed(cpu_bench, Site("o", 128, (64,)), load_teal(write_teal(body)))
    assert side(found, "TEAL", 0.5)["problem"].startswith(words)
    assert side(found, "masked", 0.5)["over_teal"] is None
    assert side(found, "masked", 0.5)["ms"]["median"] > 0


def test_a_folder_without_teal(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match=r"there is no kernels/sparse_gemv\.py; give a checkout of TEAL"):
        load_teal(tmp_path)
