"""CATS: keep the neurons of a gated MLP where |act(gate x)_i| > t (arXiv 2404.08763).

The gate is computed in full; up's rows and down's columns of the other neurons are not touched. t is the quantile of
|act(gate x)| on calibration text, MLP by MLP. We differ in the budget: sparsity is a share of the bytes of all linears,
so that the density of neurons is what is left of it for up and down (sparsify/neuron_budget.py). compensate, which is
ours, gives the mean of what the dropped neurons would have added back as a bias of down, paid from the budget.
"""

from dataclasses import dataclass
from typing import ClassVar

from sparsify.budget import check_flag, check_share
from sparsify.methods import Facts
from sparsify.neuron_cut import NeuronCut

SUMMARY = "MLP neurons by the magnitude of their activated gate, above a calibrated threshold"
PAPER = "CATS, Lee et al. 2024, arXiv 2404.08763"
FACTS = Facts(
    sparsifies="up's rows and down's columns of gated MLPs",
    choice="per-token",
    rule="fixed threshold on the activated gate",
    tensor_parallel=True,
    kernels=("reference",),
)


@dataclass(frozen=True)
class Cats:
    """CATS at one sparsity (share of all linears' weight bytes that a token does not touch)."""

    sparsity: float
    compensate: bool = False
    neuron_cut: ClassVar[NeuronCut] = "gate-threshold"

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        check_flag("compensate", self.compensate)

    @property
    def name(self) -> str:
        return "cats"


METHOD = Cats
