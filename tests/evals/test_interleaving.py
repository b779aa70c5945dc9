"""Sides in turns: the order rotates, spreads and ratios are computed by hand."""

import pytest

from sparsify.evals.interleaving import Spread, in_turns, medians, order, ratio


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([float(i) for i in range(11)][::-1]) == Spread(5.0, 1.0, 9.0)


def test_every_side_is_first_in_turn() -> None:
    assert [order("abc", index) for index in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_sides_alternate_within_every_round() -> None:
    called: list[str] = []

    def side(name: str) -> list[float]:
        called.append(name)
        return [float(len(called))]

    seen: list[tuple[int, int]] = []
    names = ("a", "b", "c")
    measured = in_turns({n: lambda n=n: side(n) for n in names}, 3, lambda done, total: seen.append((done, total)))
    assert "".join(called) == "abcbcacab"
    assert measured == {"a": [[1.0], [6.0], [8.0]], "b": [[2.0], [4.0], [9.0]], "c": [[3.0], [5.0], [7.0]]}
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_ratios_are_taken_within_rounds() -> None:
    slow, fast = [[4.0, 2.0, 9.0], [8.0], [30.0]], [[2.0], [1.0, 2.0, 99.0], [10.0]]
    assert medians(slow) == [4.0, 8.0, 30.0]
    # 4/2, 8/2, 30/10: the third round was slow for both.
    assert ratio(slow, fast) == Spread.of([2.0, 4.0, 3.0])
    with pytest.raises(ValueError, match="shorter"):
        ratio(slow, fast[:2])
