"""Top-k: keep exactly the k channels of each token with the largest |x_j| (Lazy Neuron, arXiv 2210.06313, section 4).

The paper keeps the k largest of an MLP's activations after its ReLU and trains with it. Here every linear's input is
cut, without training, at equal bytes: k is the number of channels that a linear's budget pays for, rounded down.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from sparsify.budget import Candidate, LinearShape, check_flag, check_share, split_budget
from sparsify.errors import SparsifyError
from sparsify.methods import Facts

SUMMARY = "exactly the k largest input magnitudes of each token, the same share in every linear"
PAPER = "Lazy Neuron, Li et al. 2023, arXiv 2210.06313"
FACTS = Facts(
    sparsifies="the input channels of every linear",
    choice="per-token",
    rule="exact k",
    tensor_parallel=False,
    kernels=("reference",),
)


@dataclass(frozen=True)
class TopK:
    """Top-k at one sparsity (share of each linear's weight bytes that a token does not touch).

    compensate: give the mean of what is dropped back as a bias (docs/allocation.md).
    """

    sparsity: float
    compensate: bool = False

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        check_flag("compensate", self.compensate)

    @property
    def name(self) -> str:
        return "topk"

    def bind(self, shapes: Mapping[str, LinearShape]) -> Self:
        return self

    def candidates(self, name: str, shape: LinearShape) -> tuple[Candidate, ...]:
        split = split_budget(
            name, shape, sparsity=self.sparsity, rho=1.0, score="magnitude", compensated=self.compensate
        )
        return (whole_channels(name, shape, split),)


def whole_channels(name: str, shape: LinearShape, split: Candidate) -> Candidate:
    """Returns the split with its density rounded down to k channels, cut by top-k; a dense one as it is.

    Raises SparsifyError where it pays for less than one channel.
    """
    if split.density == 1.0:
        return split
    k = math.floor(split.density * shape.inputs)
    if k == 0:
        raise SparsifyError(
            f"sparsity {split.sparsity} pays for less than one of the {shape.inputs} channels of {name}: "
            "use a lower sparsity, or method teal, which keeps a channel of some tokens only"
        )
    return replace(split, density=k / shape.inputs, cut="top-k")


METHOD = TopK
