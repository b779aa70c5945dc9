"""Statistical top-k: keep |x_j| > mean + z·std of the token's |x| (Spark Transformer, arXiv 2506.06644).

The paper cuts an MLP's pre-activations (and attention's) and trains with it, with z the normal quantile of the density.
Here every linear's input is cut, without training, at equal bytes, and z is the quantile of (|x_j| − mean)/std on
calibration text: magnitudes are not normal. Not covered: the paper's soft threshold, which subtracts the cutoff.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from sparsify.budget import Candidate, LinearShape, check_flag, check_share, split_budget
from sparsify.methods import Facts

SUMMARY = "input magnitude above the token's own mean + z·std, z from calibration"
PAPER = "Spark Transformer, You et al. 2025, arXiv 2506.06644"
FACTS = Facts(
    sparsifies="the input channels of every linear",
    choice="per-token",
    rule="the token's mean + z·std",
    tensor_parallel=False,
    kernels=("reference",),
)


@dataclass(frozen=True)
class StatisticalTopK:
    """Statistical top-k at one sparsity (share of each linear's weight bytes that tokens do not touch on average).

    compensate: give the mean of what is dropped back as a bias (docs/allocation.md).
    """

    sparsity: float
    compensate: bool = False

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        check_flag("compensate", self.compensate)

    @property
    def name(self) -> str:
        return "statistical-topk"

    def bind(self, shapes: Mapping[str, LinearShape]) -> Self:
        return self

    def candidates(self, name: str, shape: LinearShape) -> tuple[Candidate, ...]:
        split = split_budget(
            name, shape, sparsity=self.sparsity, rho=1.0, score="magnitude", compensated=self.compensate
        )
        return (split if split.density == 1.0 else replace(split, cut="mean-std"),)


METHOD = StatisticalTopK
