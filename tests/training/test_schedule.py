"""The factor of the L1 term: the paper's equation, transcribed, at every step; stages that cannot be are refused."""

import math
from itertools import pairwise

import pytest

from sparsify.errors import SparsifyError
from sparsify.training.schedule import LambdaSchedule

PAPER_7B = LambdaSchedule((5000, 6000, 10000, 12000, 16000, 16500), (0.0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1))
PAPER_13B = LambdaSchedule((5500, 6750, 10750, 11000, 15000, 16000), (0.0, 5e-3, 1e-2, 1e-2, 2e-2, 2e-2))


def paper(t: int, ends: tuple[int, ...], factors: tuple[float, ...]) -> float:
    """arXiv 2402.13516, section 3.2: λ₁ in the first stage, then λ_{i−1} + η·(λ_i − λ_{i−1})."""
    if t < ends[0]:
        return factors[0]
    for (start, low), (end, high) in pairwise(zip(ends, factors, strict=True)):
        if start <= t < end:
            eta = 0.5 * (math.sin(-math.pi / 2 + (t - start) / (end - start) * math.pi) + 1)
            return low + eta * (high - low)
    return factors[-1]


@pytest.mark.parametrize("schedule", [PAPER_7B, PAPER_13B], ids=["7b", "13b"])
def test_factor_is_the_papers_at_every_step(schedule: LambdaSchedule) -> None:
    for t in range(0, schedule.steps + 100, 7):
        assert schedule.at(t) == pytest.approx(paper(t, schedule.ends, schedule.factors), abs=1e-15)


def test_factor_meets_the_stages_and_never_falls_in_the_papers_schedule() -> None:
    for end, factor in zip(PAPER_7B.ends, PAPER_7B.factors, strict=True):
        assert PAPER_7B.at(end) == pytest.approx(factor, abs=1e-12)
    values = [PAPER_7B.at(t) for t in range(PAPER_7B.steps)]
    assert all(later >= earlier - 1e-15 for earlier, later in pairwise(values))
    # Half way up a ramp it is half way between its ends.
    assert PAPER_7B.at(14000) == pytest.approx((5e-2 + 2e-1) / 2)


def test_scaled_keeps_the_shares_of_the_stages_and_ends_at_the_peak() -> None:
    small = PAPER_7B.scaled(165, peak=0.4)
    assert small.ends == (50, 60, 100, 120, 160, 165)
    assert small.factors == pytest.approx((0.0, 0.01, 0.1, 0.1, 0.4, 0.4))
    for t in range(165):
        assert small.at(t) == pytest.approx(2 * PAPER_7B.at(100 * t))


@pytest.mark.parametrize(
    ("ends", "factors", "message"),
    [
        ((10, 5), (0.0, 0.1), "one ends at step 5, after one that ends at step 10"),
        ((10, 10), (0.0, 0.1), "must follow each other"),
        ((0, 10), (0.0, 0.1), "one ends at step 0"),
        ((), (), "at least one stage"),
        ((10, 20), (0.0,), "2 stage ends and 1 factors"),
        ((10,), (-0.1,), "at least 0, not -0.1"),
        ((10,), (math.nan,), "not nan"),
    ],
)
def test_stages_that_cannot_be_are_refused(ends: tuple[int, ...], factors: tuple[float, ...], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        LambdaSchedule(ends, factors)


def test_scaling_to_what_cannot_be_is_refused() -> None:
    with pytest.raises(SparsifyError, match="6 stages do not fit into 8 steps"):
        PAPER_7B.scaled(8)
    with pytest.raises(SparsifyError, match=r"whose last factor is 0 cannot be scaled to 0\.1"):
        LambdaSchedule((10,), (0.0,)).scaled(5, 0.1)
    assert LambdaSchedule((10,), (0.0,)).scaled(5, 0.0) == LambdaSchedule((5,), (0.0,))
