"""Measurements in turns: every side once a round, another one first each time, medians and spreads of what came out.

A machine that slows down in the middle then slows every side, and ratios are taken within a round.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Returns the spread of one value or more."""
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def in_turns(
    sides: Mapping[str, Callable[[], list[float]]], rounds: int, progress: Progress | None = None
) -> dict[str, list[list[float]]]:
    """Returns what each side measured, a list a round; progress is called with (rounds done, rounds in all)."""
    measured: dict[str, list[list[float]]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in order(list(sides), index):
            measured[name].append(sides[name]())
        if progress is not None:
            progress(index + 1, rounds)
    return measured


def order(names: Sequence[str], index: int) -> list[str]:
    """Returns the names in the order of round `index`: the first one moves to the end from round to round."""
    first = index % len(names)
    return [*names[first:], *names[:first]]


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Returns the median of each round."""
    return [statistics.median(values) for values in rounds]


def ratio(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> Spread:
    """Returns the spread of the slow side's median over the fast one's, one value a round."""
    return Spread.of([a / b for a, b in zip(medians(slow), medians(fast), strict=True)])
