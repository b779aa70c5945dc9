"""The default: what measured best. Not a method of a paper, but a choice among those that are here.

The model is rotated where it can be (sparsify.rotation). Each linear's score (magnitude, column norm, residual norm),
its rank and its share of the bytes are chosen together by the allocation `sensitivity`, on calibration text, in the
model that is sparse already. Then a bias for what is dropped is learned (sparsify.compensation). Left out because they
did not help: thresholds from the sparse model's own activations, learned scales (docs/allocation.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from sparsify.budget import Candidate, LinearShape, check_share
from sparsify.low_rank import check_svd
from sparsify.methods.rsparse import FACTS as RSPARSE_FACTS
from sparsify.methods.rsparse import RSparse

SUMMARY = "rotates the model; score, rank and share by their value in the sparse model; a learned bias: the default"
PAPER = "ours; docs/allocation.md"
FACTS = replace(RSPARSE_FACTS, rule="fixed threshold; a low-rank product for what is below it, where that pays")


@dataclass(frozen=True)
class Auto:
    """auto at one sparsity (share of all linears' weight bytes that a token does not touch).

    svd: how low-rank factors are computed, "exact", "randomised", or "auto" (docs/plan.md).
    """

    sparsity: float
    svd: str = "auto"

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        check_svd(self.svd)

    @property
    def name(self) -> str:
        return "auto"

    @property
    def default_allocation(self) -> str:
        """The allocation where a conversion asks for none: what makes this method's choices."""
        return "sensitivity"

    @property
    def rotation(self) -> str:
        """Where the model can be rotated as a whole (sparsify.rotation), it is: that costs a token nothing."""
        return "where-possible"

    @property
    def learns_compensation(self) -> bool:
        """Whether a conversion learns the compensation of this method's candidates (sparsify.compensation)."""
        return True

    def bind(self, shapes: Mapping[str, LinearShape]) -> Self:
        return self

    def candidates(self, name: str, shape: LinearShape) -> tuple[Candidate, ...]:
        return RSparse(self.sparsity, rho="auto", score="auto", compensate=True).candidates(name, shape)


METHOD = Auto
