"""The search for a setting: within its tolerance on smooth curves, below the jump on steps, work shared between p."""

import math
from collections.abc import Callable

import pytest

from sparsify.evals.rise_search import MOST_STEPS, RESOLUTION, TOLERANCE, RiseSearch

_CURVES: dict[str, Callable[[float], float]] = {
    "square": lambda x: 0.8 * x * x,
    "steep": lambda x: math.expm1(9 * x**3),
    "flat": lambda x: 0.2 * x**0.7,
    "overflow": lambda x: math.inf if x > 0.4 else x**2,
    "falls first": lambda x: x**2 - 0.002 * x,
}


@pytest.mark.parametrize("name", _CURVES)
@pytest.mark.parametrize("p", [0.001, 0.01, 0.05, 0.1])
def test_the_rise_is_within_its_tolerance(name: str, p: float) -> None:
    calls: list[float] = []

    def measure(setting: float) -> float:
        calls.append(setting)
        return _CURVES[name](setting)

    found = RiseSearch(measure, most=1.0).largest(p)
    assert (1 - TOLERANCE) * p <= _CURVES[name](found) <= p
    assert len(calls) == len(set(calls)) <= 20


def test_where_nothing_rises_everything_goes() -> None:
    assert RiseSearch(lambda x: 0.001 * x, most=3.0).largest(0.01) == 3.0


def test_a_jump_ends_below_it() -> None:
    found = RiseSearch(lambda x: 0.0 if x < 0.3 else 1.0, most=1.0).largest(0.01)
    assert 0.3 * (1 - 2 * RESOLUTION) <= found < 0.3


def test_what_rises_at_once_stays_dense() -> None:
    calls: list[float] = []
    found = RiseSearch(lambda x: calls.append(x) or 1.0, most=1.0).largest(0.01)  # type: ignore[func-returns-value]
    assert found == 0.0
    assert len(calls) <= MOST_STEPS + 1


def test_it_ends_before_the_first_rise_that_is_too_large() -> None:
    search = RiseSearch(lambda x: 0.05 if 0.2 < x < 0.3 else x**2 / 10, most=1.0)
    search.rises |= {0.25: 0.05, 0.31: 0.00961}
    search.rises = dict(sorted(search.rises.items()))
    assert search.largest(0.01) < 0.25


@pytest.mark.parametrize("neurons", [7, 172])
def test_steps_are_multiples_and_end_at_their_neighbour(neurons: int) -> None:
    calls: list[float] = []

    def measure(setting: float) -> float:
        calls.append(setting)
        return 2 * setting**2

    found = RiseSearch(measure, most=1.0, step=1 / neurons).largest(0.1)
    kept = round(found * neurons)
    assert found * neurons == pytest.approx(kept)
    # Either within the tolerance, or the next step is too far.
    assert 2 * found**2 >= 0.099 or 2 * ((kept + 1) / neurons) ** 2 > 0.1
    assert len({round(call * neurons) for call in calls}) == len(calls)


def test_several_tolerances_share_their_measurements() -> None:
    counts = []
    for tolerances in ([0.05], [0.01, 0.05]):
        calls: list[float] = []
        search = RiseSearch(lambda x, calls=calls: calls.append(x) or x**2, most=1.0)  # type: ignore[misc]
        found = [search.largest(p) for p in tolerances]
        counts.append(len(calls))
    assert found == sorted(found)
    assert counts[1] < 2 * counts[0]
