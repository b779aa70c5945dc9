"""The sparsity law: recovered from points on it, the paper's own included; what cannot be fitted is refused."""

import pytest

from sparsify.errors import SparsifyError
from sparsify.evals.sparsity_law import SparsityLaw, fit_law

PAPER_7B = SparsityLaw(1.76, 0.30, 3.49, 0.0)


def test_the_papers_law_gives_the_papers_sparsity() -> None:
    # Llama-2-7B, without the shift, at λ 0.2: 88.11%; vanilla ReLU 66.98%.
    assert PAPER_7B.at(0.2) == pytest.approx(88.11, abs=1.5)
    assert PAPER_7B.at(0.0) == pytest.approx(66.98, abs=0.5)


@pytest.mark.parametrize("law", [PAPER_7B, SparsityLaw(0.4, 1.1, 2.9, 0.0)], ids=["paper", "steeper"])
def test_points_on_a_law_give_it_back(law: SparsityLaw) -> None:
    factors = [0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    found = fit_law(factors, [law.at(factor) for factor in factors])
    assert (found.a, found.b, found.c) == pytest.approx((law.a, law.b, law.c), rel=1e-2)
    assert found.error < 0.01


def test_points_off_any_law_say_how_far() -> None:
    factors = [0.0, 0.1, 0.2, 0.4, 0.8]
    noise = [1.0, -1.0, 1.0, -1.0, 1.0]
    found = fit_law(factors, [PAPER_7B.at(x) + e for x, e in zip(factors, noise, strict=True)])
    errors = [found.at(x) - PAPER_7B.at(x) - e for x, e in zip(factors, noise, strict=True)]
    assert found.error == pytest.approx((sum(e * e for e in errors) / 5) ** 0.5, rel=1e-6)
    assert 0.2 < found.error < 1.5


def test_too_few_points_and_impossible_ones_are_refused() -> None:
    with pytest.raises(SparsifyError, match="3 factors were given, it takes at least 4"):
        fit_law([0.0, 0.1, 0.2, 0.2], [60.0, 70.0, 80.0, 80.0])
    with pytest.raises(SparsifyError, match="below 100%"):
        fit_law([0.0, 0.1, 0.2, 0.3], [60.0, 70.0, 80.0, 100.0])
