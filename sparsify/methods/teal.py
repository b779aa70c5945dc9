"""TEAL: keep the channels whose input is large, |x_j| > t (arXiv 2408.14690, eq. 4).

The paper's greedy allocation over a block's linears is sparsify/allocation/greedy.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from sparsify.budget import Candidate, LinearShape, check_flag, check_share, split_budget
from sparsify.methods import Facts

SUMMARY = "input magnitude against a calibrated threshold, the same sparsity in every linear"
PAPER = "Liu et al. 2024, arXiv 2408.14690"
FACTS = Facts(
    sparsifies="the input channels of every linear",
    choice="per-token",
    rule="fixed threshold",
    tensor_parallel=True,
    kernels=("reference", "native", "triton"),
)


@dataclass(frozen=True)
class Teal:
    """TEAL at one sparsity (share of each linear's weight bytes that a token does not touch).

    compensate: give the mean of what is dropped back as a bias (docs/allocation.md).
    """

    sparsity: float
    compensate: bool = False

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        check_flag("compensate", self.compensate)

    @property
    def name(self) -> str:
        return "teal"

    def bind(self, shapes: Mapping[str, LinearShape]) -> Self:
        return self

    def candidates(self, name: str, shape: LinearShape) -> tuple[Candidate, ...]:
        split = split_budget(
            name, shape, sparsity=self.sparsity, rho=1.0, score="magnitude", compensated=self.compensate
        )
        return (split,)


METHOD = Teal
