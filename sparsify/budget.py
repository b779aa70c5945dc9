"""The byte ledger's arithmetic: what one token touches in a linear, and how a budget is split inside it.

Every weight byte counts: active channels, low-rank factors, score scales, the threshold, and the bias of a compensated
linear. "Sparsity 0.5" means half of the dense bytes of the linear's weight, all of these included. Biases that the
dense model has are touched either way and left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sparsify.errors import SparsifyError
from sparsify.token_cut import TokenCut

# What is rotated: the whole residual stream, or the input of each attention and MLP.
Rotation = Literal["model", "layer"]
Score = Literal["magnitude", "column-norm", "residual-norm"]

THRESHOLD_BYTES = 4
SCALE_BYTES = 4


@dataclass(frozen=True)
class LinearShape:
    """Shape [outputs, inputs] of a linear's weight and the bytes of one of its elements.

    site_outputs: the outputs of all linears of its input site, where that is the input of an attention or an MLP; 0 for
    a linear that writes to the residual stream (o, down).
    """

    outputs: int
    inputs: int
    element_size: int
    site_outputs: int = 0

    @property
    def dense_bytes(self) -> int:
        return self.outputs * self.inputs * self.element_size

    def overhead_bytes(self, *, scaled: bool, compensated: bool = False) -> int:
        bias = self.outputs * self.element_size if compensated else 0
        return THRESHOLD_BYTES + (SCALE_BYTES * self.inputs if scaled else 0) + bias

    @property
    def rotation_bytes(self) -> float:
        """Its part of the site's rotation [inputs, inputs], which all linears of the site share by their outputs."""
        if not self.site_outputs:
            return 0.0
        return self.inputs * self.inputs * self.element_size * self.outputs / self.site_outputs

    def low_rank_bytes(self, rank: int) -> int:
        return rank * (self.inputs + self.outputs) * self.element_size


@dataclass(frozen=True)
class Candidate:
    """One way to spend a linear's budget: a share of its channels by a score, and a rank.

    density is the share of channels a token uses on average, rho the share of the budget meant for channels; cut says
    how a token's channels are cut, None by a threshold that is the same for all tokens; compensated, whether the mean
    of what is dropped is given back as a bias; rotated, whether the channels are those of Qᵀx, Q stored by site.
    """

    sparsity: float
    rho: float
    rank: int
    density: float
    score: Score
    cut: TokenCut | None = None
    compensated: bool = False
    rotated: bool = False

    @property
    def scaled(self) -> bool:
        return self.score != "magnitude"


def split_budget(
    name: str,
    shape: LinearShape,
    *,
    sparsity: float,
    rho: float,
    score: Score,
    compensated: bool = False,
    rotated: bool = False,
) -> Candidate:
    """Splits the bytes (1 − sparsity) · dense_bytes of one linear into a rank and a density of channels.

    The rank is R-Sparse's ⌊(I·O·(1−s) − ⌊I(1−s)ρ⌋·O)/(I+O)⌋, from the linear's own shape (arXiv 2504.19449 and its
    code, which takes O = hidden size for k and v: wrong under grouped-query attention). We differ in the rest: what
    rounding leaves over goes to channels, and all that is stored besides channels is paid from the same budget.
    Raises SparsifyError where the budget does not even pay for these.
    """
    if sparsity == 0.0:
        # The whole budget in channels is the dense linear, exactly.
        return Candidate(sparsity, 1.0, 0, 1.0, "magnitude")
    overhead: float = shape.overhead_bytes(scaled=score != "magnitude", compensated=compensated)
    if rotated:
        overhead += shape.rotation_bytes
    budget = (1.0 - sparsity) * shape.dense_bytes - overhead
    if budget <= 0:
        stored = {"scales": score != "magnitude", "compensation": compensated, "rotation": rotated}
        taken = " and ".join(["thresholds", *(part for part, has in stored.items() if has)])
        raise SparsifyError(
            f"sparsity {sparsity} leaves {(1 - sparsity) * shape.dense_bytes:.0f} bytes for {name} "
            f"[{shape.outputs}, {shape.inputs}], less than its {taken} take: use a lower sparsity, "
            "or method teal, which has thresholds only"
        )
    inputs, outputs = shape.inputs, shape.outputs
    kept = inputs * (1.0 - sparsity)
    channels = math.floor(kept * rho)
    rank = math.floor((kept * outputs - channels * outputs) / (inputs + outputs)) if rho < 1.0 else 0
    rank = min(rank, inputs, outputs, math.floor(budget / shape.low_rank_bytes(1)))
    density = (budget - shape.low_rank_bytes(rank)) / shape.dense_bytes
    return Candidate(sparsity, rho, rank, min(density, 1.0), score, compensated=compensated, rotated=rotated)


def uncompensated(candidate: Candidate, shape: LinearShape) -> Candidate:
    """Returns the candidate without compensation at the same bytes: they go to channels."""
    if not candidate.compensated:
        return candidate
    spared = shape.overhead_bytes(scaled=False, compensated=True) - shape.overhead_bytes(scaled=False)
    density = min(1.0, candidate.density + spared / shape.dense_bytes)
    return replace(candidate, density=density, compensated=False)


def fill_budget(
    wishes: Mapping[str, float], shapes: Mapping[str, LinearShape], *, sparsity: float, least: Mapping[str, float]
) -> dict[str, float]:
    """Returns shares of each linear's dense bytes in proportion to the wishes, which add up to the budget.

    Σ share · dense_bytes = (1 − sparsity) · Σ dense_bytes, least ≤ share ≤ 1, share = wish · c in between with one c
    for all. Raises SparsifyError where even the least shares cost more than the budget.
    """
    dense = {name: shapes[name].dense_bytes for name in wishes}
    budget = (1.0 - sparsity) * sum(dense.values())
    if sum(least[name] * dense[name] for name in wishes) > budget:
        raise SparsifyError(f"sparsity {sparsity} leaves less than the least shares of the linears cost: lower it")
    low, high = 0.0, max(1.0 / wish for wish in wishes.values())
    for _ in range(200):
        c = (low + high) / 2
        shares = {name: min(1.0, max(least[name], wish * c)) for name, wish in wishes.items()}
        spent = sum(shares[name] * dense[name] for name in wishes)
        low, high = (low, c) if spent > budget else (c, high)
    return shares


def check_flag(name: str, value: object) -> bool:
    """Returns value where it is a bool. Raises SparsifyError otherwise."""
    if not isinstance(value, bool):
        raise SparsifyError(f"{name} is {value!r}: it must be true or false")
    return value


def check_share(name: str, value: object, *, one_allowed: bool) -> float:
    """Returns value as a float in [0, 1), or [0, 1] where one_allowed. Raises SparsifyError otherwise."""
    allowed = "[0, 1]" if one_allowed else "[0, 1)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SparsifyError(f"{name} is {value!r}: it must be a number in {allowed}")
    inside = 0.0 <= value < 1.0 or (one_allowed and value == 1.0)
    if not inside:
        hint = f" Did you mean {value / 100}?" if 1.0 < value <= 100.0 else ""
        raise SparsifyError(f"{name} is {value}: it must be in {allowed}.{hint}")
    return float(value)
