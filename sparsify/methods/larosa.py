"""LaRoSA: rotate the input of attention and MLP into its principal components, keep the k largest (arXiv 2507.01299).

ŷ = (W Q) topk(Qᵀ x), Q the eigenvectors of XᵀX of calibration activations, for q|k|v and gate|up; o and down are cut
by top-k on their plain input. The split over linears is sparsify/allocation/larosa.py. Two forms, by `rotation`:

"model": one Q for the whole residual stream, folded into the weights (sparsify/rotation.py). No adapter, and every byte
goes to channels. "layer": the paper's, a Q for each input site. A token pays for the product Qᵀx, from the same budget.
Where we differ: the paper's product on the residual stream is Q_lᵀ Q_{l+1}, here it is Q before each site, of the same
bytes, so that weights stay as they are; and its bytes, which the paper does not count, are counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, get_args

from sparsify.budget import Candidate, LinearShape, Rotation, check_flag, check_share, split_budget
from sparsify.errors import SparsifyError, suggest
from sparsify.methods import Facts
from sparsify.methods.topk import whole_channels

SUMMARY = "exactly the k largest channels of each token after a rotation into principal components"
PAPER = "LaRoSA, Liu et al. 2025, arXiv 2507.01299"
FACTS = Facts(
    sparsifies="the input channels of every linear, those of attention and MLP inputs after a rotation",
    choice="per-token",
    rule="exact k",
    tensor_parallel=False,
    kernels=("reference",),
)


@dataclass(frozen=True)
class Larosa:
    """LaRoSA at one sparsity (share of all linears' weight bytes, rotations included, that a token does not touch).

    rotation: "model", one for the residual stream, or "layer", one for each input of an attention or an MLP.
    compensate: give the mean of what is dropped back as a bias (docs/allocation.md).
    """

    sparsity: float
    rotation: str = "model"
    compensate: bool = False

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        check_flag("compensate", self.compensate)
        allowed = get_args(Rotation)
        if self.rotation not in allowed:
            raise SparsifyError(
                f"unknown rotation {self.rotation!r}: allowed are {', '.join(allowed)}."
                f"{suggest(str(self.rotation), allowed)}"
            )

    @property
    def name(self) -> str:
        return "larosa"

    @property
    def default_allocation(self) -> str:
        """The allocation where a conversion asks for none: the paper's split."""
        return "larosa"

    def bind(self, shapes: Mapping[str, LinearShape]) -> Self:
        return self

    def candidates(self, name: str, shape: LinearShape) -> tuple[Candidate, ...]:
        split = split_budget(
            name,
            shape,
            sparsity=self.sparsity,
            rho=1.0,
            score="magnitude",
            compensated=self.compensate,
            rotated=self.rotation == "layer" and shape.site_outputs > 0,
        )
        return (whole_channels(name, shape, split),)


METHOD = Larosa
