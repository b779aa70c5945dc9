"""Cuts that depend on the token: ties, NaN, equal scores, and the quantile that calibration finds."""

import pytest
import torch

from sparsify.calibration import ScoreHistogram
from sparsify.token_cut import counted_scores, fitted_number, mean_std_mask, top_k_mask


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_top_k_is_exact_in_every_row(k: int) -> None:
    # Rounded to bf16 so that many scores are equal.
    score = torch.rand(64, 8).bfloat16().float().mul(8).round()
    keep = top_k_mask(score, torch.tensor(float(k)))
    assert (keep.sum(-1) == k).all()
    for row, kept in zip(score.tolist(), keep.tolist(), strict=True):
        ordered = sorted(range(8), key=lambda j: (-row[j], j))
        assert [j for j in range(8) if kept[j]] == sorted(ordered[:k])


def test_nan_is_kept_by_both() -> None:
    score = torch.tensor([[0.0, 5.0, float("nan"), 1.0]])
    assert top_k_mask(score, torch.tensor(1.0)).tolist() == [[False, False, True, False]]
    assert mean_std_mask(score, torch.tensor(0.0)).all()


def test_mean_std_is_strict_and_each_row_has_its_own_cutoff() -> None:
    # Means 2 and 20, standard deviations 2 and 20.
    score = torch.tensor([[0.0, 4.0, 0.0, 4.0], [0.0, 40.0, 0.0, 40.0]])
    assert mean_std_mask(score, torch.tensor(0.5)).tolist() == [[False, True, False, True]] * 2
    assert not mean_std_mask(score, torch.tensor(1.0)).any()
    assert not mean_std_mask(torch.full((1, 4), 3.0), torch.tensor(0.0)).any()


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.9])
def test_the_fitted_z_keeps_the_density(density: float) -> None:
    score = torch.randn(512, 96).abs() * torch.rand(512, 1).exp()
    histogram = ScoreHistogram()
    histogram.add(counted_scores("mean-std", score))
    z = fitted_number("mean-std", histogram.threshold(density), density=density, inputs=96)
    assert float(mean_std_mask(score, torch.tensor(z)).float().mean()) == pytest.approx(density, abs=0.003)


def test_equal_scores_are_counted_as_the_mean_and_nan_as_nan() -> None:
    counted = counted_scores("mean-std", torch.tensor([[3.0, 3.0], [float("nan"), 1.0]]))
    assert counted[0].tolist() == [1.0, 1.0]
    assert counted[1].isnan().all()
