"""WINA: keep the channels that contribute most, |x_j|·‖W[:,j]‖₂ > t (arXiv 2505.19427, eq. 3), uniform over linears.

The exact column norm scores every linear; the public code uses it for k and gate only. We threshold at a calibrated
quantile where the paper takes the top k of each token. Not covered: the orthogonalising rotation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from sparsify.budget import Candidate, LinearShape, check_flag, check_share, split_budget
from sparsify.methods import Facts

SUMMARY = "input magnitude times weight column norm against a calibrated threshold"
PAPER = "Chen et al. 2025, arXiv 2505.19427"
FACTS = Facts(
    sparsifies="the input channels of every linear",
    choice="per-token",
    rule="fixed threshold",
    tensor_parallel=True,
    kernels=("reference", "native", "triton"),
)


@dataclass(frozen=True)
class Wina:
    """WINA at one sparsity (share of each linear's weight bytes that a token does not touch).

    compensate: give the mean of what is dropped back as a bias (docs/allocation.md).
    """

    sparsity: float
    compensate: bool = False

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        check_flag("compensate", self.compensate)

    @property
    def name(self) -> str:
        return "wina"

    def bind(self, shapes: Mapping[str, LinearShape]) -> Self:
        return self

    def candidates(self, name: str, shape: LinearShape) -> tuple[Candidate, ...]:
        split = split_budget(
            name, shape, sparsity=self.sparsity, rho=1.0, score="column-norm", compensated=self.compensate
        )
        return (split,)


METHOD = Wina
