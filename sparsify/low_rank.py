"""Truncated singular value decomposition of a weight, in fp64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """L = lr_b · lr_a ≈ W at the largest rank asked for, lr_a [R, I] and lr_b [O, R] in W's dtype; W's singular values.

    The first r rows of lr_a and columns of lr_b are the best approximation of rank r (Eckart–Young).
    """

    lr_a: Tensor
    lr_b: Tensor
    singular_values: Tensor

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns views (lr_a [rank, I], lr_b [O, rank])."""
        return self.lr_a[:rank], self.lr_b[:, :rank]

    def energy_ranks(self) -> tuple[int, int, int]:
        """Returns the ranks that hold 50, 90 and 99% of ‖W‖²: how fast the singular values decay."""
        energy = self.singular_values.square().cumsum(0)
        first, second, third = (int((energy < level * energy[-1]).sum()) + 1 for level in (0.5, 0.9, 0.99))
        return first, second, third


def low_rank(weight: Tensor, rank: int) -> LowRank:
    """Decomposes weight [O, I] = U S Vᵀ in fp64; √S goes to each side, so that both round equally well."""
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank((root[:, None] * vh[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype), s)
