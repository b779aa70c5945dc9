"""GRIFFIN: the prompt chooses the MLP neurons of its sequence (arXiv 2404.01365).

Over the prompt's tokens, which run dense, each token's neurons h (what enters down) are divided by their L2 norm; the k
neurons with the largest L2 norm over tokens are kept for the tokens that follow. We differ: every sequence of a batch
has its own set, and k follows from a byte budget over all linears (sparsify/neuron_budget.py).
"""

from dataclasses import dataclass
from typing import ClassVar

from sparsify.budget import check_share
from sparsify.methods import Facts
from sparsify.neuron_cut import NeuronCut

SUMMARY = "the k MLP neurons that matter most over the prompt, which runs dense, kept for the tokens after it"
PAPER = "GRIFFIN, Dong et al. 2024, arXiv 2404.01365"
FACTS = Facts(
    sparsifies="gate's and up's rows and down's columns of MLPs, gated or not",
    choice="per-prompt",
    rule="exact k",
    tensor_parallel=False,
    kernels=("reference",),
)


@dataclass(frozen=True)
class Griffin:
    """GRIFFIN at one sparsity (share of all linears' weight bytes that a token after the prompt does not touch)."""

    sparsity: float
    neuron_cut: ClassVar[NeuronCut] = "prompt-top-k"

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)

    @property
    def name(self) -> str:
        return "griffin"


METHOD = Griffin
