"""The ledger's arithmetic: every split of a budget spends it to the byte, from the linear's own shape."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.budget import LinearShape, Score, check_share, split_budget
from sparsify.errors import SparsifyError
from sparsify.ledger import Ledger, LinearBytes


def ledger_line(shape: LinearShape, *, sparsity: float, rho: float, score: Score) -> LinearBytes:
    candidate = split_budget("linear", shape, sparsity=sparsity, rho=rho, score=score)
    return LinearBytes(
        "linear", shape.outputs, shape.inputs, shape.element_size, candidate.rank, candidate.density, candidate.scaled
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 5000),
    inputs=st.integers(1, 5000),
    element_size=st.sampled_from([2, 4, 8]),
    sparsity=st.floats(0.001, 0.999),
    rho=st.floats(0.0, 1.0),
    score=st.sampled_from(["magnitude", "column-norm"]),
)
def test_what_a_token_touches_is_the_budget(
    outputs: int, inputs: int, element_size: int, sparsity: float, rho: float, score: Score
) -> None:
    shape = LinearShape(outputs, inputs, element_size)
    budget = (1.0 - sparsity) * shape.dense_bytes
    if budget <= shape.overhead_bytes(scaled=score == "column-norm"):
        with pytest.raises(SparsifyError, match="use a lower sparsity"):
            ledger_line(shape, sparsity=sparsity, rho=rho, score=score)
        return
    line = ledger_line(shape, sparsity=sparsity, rho=rho, score=score)
    assert 0.0 <= line.density <= 1.0
    assert 0 <= line.rank <= min(outputs, inputs)
    assert line.touched_bytes == pytest.approx(budget, rel=1e-9)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (11008, 4096), (4096, 11008), (8, 64)], ids=str)
def test_rank_and_channels_are_the_papers(shape: tuple[int, int], rho: float, sparsity: float) -> None:
    """channels = ⌊I(1−s)α⌋, rank = ⌊(I·O(1−s) − channels·O)/(I+O)⌋, O the linear's own, not the hidden size."""
    outputs, inputs = shape
    kept = inputs * (1.0 - sparsity)
    channels = math.floor(kept * rho)
    rank = math.floor((kept * outputs - channels * outputs) / (inputs + outputs)) if rho < 1.0 else 0
    found = split_budget("linear", LinearShape(outputs, inputs, 2), sparsity=sparsity, rho=rho, score="column-norm")
    # Scales and threshold cost the bytes of 2·I + 2 weights, which the paper does not count; a rank costs I + O.
    left = kept * outputs - (2 * inputs + 2)
    assert found.rank == min(rank, outputs, inputs, math.floor(left / (inputs + outputs)))
    if found.rank == rank:
        least = channels - (2 * inputs + 2) / outputs
        most = channels + (inputs + outputs) / outputs + 1
        assert least - 1e-6 <= found.density * inputs <= most


def test_sparsity_zero_is_the_dense_linear() -> None:
    for score in ("magnitude", "column-norm"):
        found = split_budget("linear", LinearShape(7, 5, 2), sparsity=0.0, rho=0.5, score=score)
        assert (found.density, found.rank, found.scaled) == (1.0, 0, False)


def test_budget_too_small_names_the_linear_and_the_way_out() -> None:
    with pytest.raises(SparsifyError, match=r"k_proj \[4, 64\].*or method teal") as raised:
        split_budget("k_proj", LinearShape(4, 64, 2), sparsity=0.99, rho=1.0, score="column-norm")
    assert raised.value.exit_code == 2
    assert split_budget("k_proj", LinearShape(4, 64, 2), sparsity=0.99, rho=1.0, score="magnitude").density > 0.0


def test_a_model_weighs_its_linears_by_bytes() -> None:
    large = LinearBytes("large", 100, 100, 2, 0, 0.25, False)
    small = LinearBytes("small", 10, 10, 2, 0, 1.0, False)
    ledger = Ledger(0.5, (large, small), 1000, ())
    touched = 0.25 * 20000 + 4 + 200
    assert ledger.touched_bytes == touched
    assert ledger.weighted_sparsity == pytest.approx(1 - touched / 20200)
    assert ledger.model_sparsity == pytest.approx(1 - (touched + 1000) / 21200)
    realised = ledger.with_densities({"large": 0.5})
    assert realised.touched_bytes == 0.5 * 20000 + 4 + 200
    assert Ledger.from_dict(ledger.to_dict()) == ledger


@pytest.mark.parametrize("value", [-0.1, 1.0001, 50, math.nan, math.inf, "0.5", None, True])
def test_shares_outside_are_refused(value: object) -> None:
    for one_allowed in (False, True):
        with pytest.raises(SparsifyError, match="rho is"):
            check_share("rho", value, one_allowed=one_allowed)


def test_shares_inside_are_taken() -> None:
    assert check_share("rho", 1, one_allowed=True) == 1.0
    assert check_share("sparsity", 0, one_allowed=False) == 0.0
    with pytest.raises(SparsifyError, match=r"\[0, 1\)"):
        check_share("sparsity", 1.0, one_allowed=False)
    with pytest.raises(SparsifyError, match=r"Did you mean 0\.5\?"):
        check_share("sparsity", 50, one_allowed=False)
