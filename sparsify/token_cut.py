"""Cuts that depend on the token: exactly k of its channels, or those above its mean score by z standard deviations.

A cut has one number, k or z, in the place of a threshold. top-k is Lazy Neuron's (arXiv 2210.06313); mean-std is Spark
Transformer's statistical top-k (arXiv 2506.06644), score > mean + z·std. Scores are [..., I], cut row by row.
"""

import math
from typing import Literal

import torch
from torch import Tensor

TokenCut = Literal["top-k", "mean-std"]

# e^±80 lies well inside of fp32.
_MOST = 80.0


def top_k_mask(score: Tensor, k: Tensor) -> Tensor:
    """Returns the k largest of each row of score, bool; k is a number [] on the same device.

    Exactly k: of equal scores the lower channel is kept, on every device. A NaN counts as the largest.
    """
    order = score.sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(score.shape[-1], device=score.device) < k
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, first.expand_as(order))


def k_problem(value: float, of: int, density: float | None) -> str | None:
    """Returns what is wrong with a k read from a file, in one line; None where nothing is."""
    if not (value.is_integer() and 1 <= value <= of):
        return f"holds k = {value:g}, it must be an integer in [1, {of}]"
    if density is not None and round(density * of) != value:
        return f"holds k = {value:g} of {of}, its configuration has the density {density:g}"
    return None


def mean_std_mask(score: Tensor, z: Tensor) -> Tensor:
    """Returns score > mean + z·std of each row, bool; std is the population's, as in Gemma 3n's released code.

    The cut is strict, and a row with a NaN is kept whole, so that the NaN reaches the output as in a dense linear.
    """
    std, mean = torch.std_mean(score, dim=-1, correction=0, keepdim=True)
    return ~(score <= mean + z * std)


def cut_mask(cut: TokenCut, score: Tensor, number: Tensor) -> Tensor:
    """Returns the mask of a cut by its name."""
    return top_k_mask(score, number) if cut == "top-k" else mean_std_mask(score, number)


def counted_scores(cut: TokenCut, score: Tensor) -> Tensor:
    """Returns what a histogram counts for the cut, whose quantile `fitted_number` takes; not negative.

    For mean-std it is exp((score − mean) / std): the histogram's bins are relative, 0.4% of it are 0.004 of a std.
    """
    if cut == "top-k":
        return score
    std, mean = torch.std_mean(score, dim=-1, correction=0, keepdim=True)
    # Where all scores are equal, each is the mean; a NaN stays one.
    z = torch.where(std == 0, 0.0, (score - mean) / std)
    return z.clamp(-_MOST, _MOST).exp()


def fitted_number(cut: TokenCut, quantile: float, *, density: float, inputs: int) -> float:
    """Returns k, or the z above which a share `density` lies; quantile: what this share of counted scores is above."""
    return float(round(density * inputs)) if cut == "top-k" else math.log(quantile)
