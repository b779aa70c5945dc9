"""Truncated singular value decomposition of a weight, in fp64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """L = lr_b · lr_a ≈ W at the largest rank asked for, lr_a [R, I] and lr_b [O, R] in fp64, and all singular values.

    The first r rows of lr_a and columns of lr_b are the best approximation of rank r (Eckart–Young).
    """

    lr_a: Tensor
    lr_b: Tensor
    singular_values: Tensor

    def truncated(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns (lr_a [rank, I], lr_b [O, rank]), rounded once to dtype."""
        return self.lr_a[:rank].to(dtype), self.lr_b[:, :rank].to(dtype).contiguous()

    def energy_ranks(self) -> tuple[int, int, int]:
        """Returns the ranks that hold 50, 90 and 99% of ‖W‖²: how fast the singular values decay."""
        share = (self.singular_values**2).cumsum(0) / (self.singular_values**2).sum()
        first, second, third = (int((share < level).sum()) + 1 for level in (0.5, 0.9, 0.99))
        return first, second, third


def low_rank(weight: Tensor, rank: int) -> LowRank:
    """Decomposes weight [O, I], W = U S Vᵀ in fp64; √S goes to each side, so that both round equally well."""
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank((root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous(), s)
