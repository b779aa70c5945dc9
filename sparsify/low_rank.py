"""Truncated singular value decomposition of a weight: exact in fp64, or randomised where that would take too long.

Randomised is the range finder of Halko, Martinsson and Tropp (arXiv 0909.4061, algorithms 4.4 and 5.1): a random sketch
of some columns more than the rank, subspace iterations with a QR after every product, and the decomposition of what is
left in the sketch's span. Products are fp32, the last decomposition fp64. Its error is known exactly without the
spectrum, ‖W − L_r‖² = ‖W‖² − Σ_{i≤r} σ_i², the σ_i those that were found.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsify.errors import SparsifyError, suggest

Svd = Literal["auto", "exact", "randomised"]

# Up to this smaller side auto is exact: seconds, and results that do not change.
_EXACT_UP_TO = 1024
# Largest part of the smaller side that a rank may be for auto to sketch it.
_SKETCHED = 1 / 3
# Columns of the sketch beyond the rank: at least, and as a part of it; subspace iterations. What they leave of the
# optimum is in docs/plan.md.
_OVERSAMPLED, _OVERSAMPLED_PART = 16, 0.25
_ITERATIONS = 3


@dataclass(frozen=True)
class LowRank:
    """L = lr_b · lr_a ≈ W at the largest rank asked for, lr_a [R, I] and lr_b [O, R] in W's dtype.

    The first r rows of lr_a and columns of lr_b are the best approximation of rank r (Eckart–Young), or close to it.
    singular_values: all of W's, or the first R, each a lower bound, where not exact; energy: ‖W‖².
    """

    lr_a: Tensor
    lr_b: Tensor
    singular_values: Tensor
    energy: float
    exact: bool = True

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns views (lr_a [rank, I], lr_b [O, rank])."""
        return self.lr_a[:rank], self.lr_b[:, :rank]

    def energy_ranks(self) -> tuple[int | None, int | None, int | None]:
        """Returns the ranks that hold 50, 90 and 99% of ‖W‖²: how fast the singular values decay.

        None for one beyond the ranks that were computed.
        """
        held = self.singular_values.square().cumsum(0)
        whole = held[-1] if self.exact else self.energy
        first, second, third = (int((held < level * whole).sum()) + 1 for level in (0.5, 0.9, 0.99))
        known = len(held)
        return tuple(rank if rank <= known else None for rank in (first, second, third))  # type: ignore[return-value]

    def error(self, rank: int) -> float:
        """Returns ‖W − L_r‖/‖W‖ of the factors before they are rounded to W's dtype."""
        if self.energy == 0.0:
            return 0.0
        left = self.energy - float(self.singular_values[:rank].square().sum())
        return float((max(left, 0.0) / self.energy) ** 0.5)


def check_svd(svd: object) -> None:
    """Raises SparsifyError for what is none of "auto", "exact" and "randomised"."""
    allowed = get_args(Svd)
    if svd not in allowed:
        raise SparsifyError(f"unknown svd {svd!r}: allowed are {', '.join(allowed)}.{suggest(str(svd), allowed)}")


def is_exact(svd: str, outputs: int, inputs: int, rank: int) -> bool:
    """Whether a weight [outputs, inputs] is decomposed exactly at this rank.

    auto: up to a smaller side of 1,024, and where the rank is more than a third of it.
    """
    smaller = min(outputs, inputs)
    if svd == "randomised":
        # A sketch as wide as the weight is the weight.
        return sketch_columns(rank) >= smaller
    return svd == "exact" or smaller <= _EXACT_UP_TO or rank > _SKETCHED * smaller


def sketch_columns(rank: int) -> int:
    """Returns how many columns the sketch for a rank has."""
    return rank + max(_OVERSAMPLED, int(_OVERSAMPLED_PART * rank))


def low_rank(weight: Tensor, rank: int, svd: str = "auto") -> LowRank:
    """Decomposes weight [O, I] = U S Vᵀ; √S goes to each side, so that both round equally well.

    svd: "exact", "randomised", or "auto" as is_exact says. Deterministic on one machine.
    """
    weight = weight.detach()
    outputs, inputs = weight.shape
    if is_exact(svd, outputs, inputs, rank):
        return _exact(weight, rank)
    return _randomised(weight, rank)


def _exact(weight: Tensor, rank: int) -> LowRank:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    factors = (root[:, None] * vh[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)
    return LowRank(*factors, s, float(s.square().sum()))


def _randomised(weight: Tensor, rank: int) -> LowRank:
    w = weight.float()
    # Drawn on the CPU: the same sketch on every device.
    draw = torch.Generator("cpu").manual_seed(0)
    sketch = torch.randn(w.shape[1], sketch_columns(rank), generator=draw, device="cpu").to(w.device)
    basis = torch.linalg.qr(w @ sketch).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(w @ torch.linalg.qr(w.T @ basis).Q).Q
    inside = basis.T @ w
    gram = inside.double() @ inside.double().T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:rank].clamp_min(0.0), vectors.flip(1)[:, :rank]
    s = values.sqrt()
    # lr_b = Q·E·√S and lr_a = Eᵀ·(QᵀW)/√S; a direction without weight has no part in either.
    root = s.sqrt()
    turned = (vectors.T.float() @ inside).double()
    lr_a = torch.where(root > 0.0, 1.0 / root, 0.0)[:, None] * turned
    lr_b = (basis @ vectors.float()).double() * root
    energy = float(w.square().sum(dtype=torch.float64))
    return LowRank(lr_a.to(weight.dtype), lr_b.to(weight.dtype), s, energy, exact=False)
