"""Top-k: keep exactly the k channels of each token with the largest |x_j| (Lazy Neuron, arXiv 2210.06313, section 4).

The paper keeps the k largest of an MLP's activations after its ReLU and trains with it. Here every linear's input is
cut, without training, at equal bytes: k is the number of channels that a linear's budget pays for, rounded down.
"""

import math
from dataclasses import replace

from sparsify.budget import Candidate, LinearShape
from sparsify.errors import SparsifyError
from sparsify.methods import ChannelMethod, Facts

SUMMARY = "exactly the k largest input magnitudes of each token, the same share in every linear"
PAPER = "Lazy Neuron, Li et al. 2023, arXiv 2210.06313"
FACTS = Facts(
    sparsifies="the input channels of every linear",
    choice="per-token",
    rule="exact k",
    tensor_parallel=False,
    kernels=("reference",),
)


class TopK(ChannelMethod):
    """Top-k at one sparsity."""

    name = "topk"

    def cut(self, name: str, shape: LinearShape, split: Candidate) -> Candidate:
        return whole_channels(name, shape, split)


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
