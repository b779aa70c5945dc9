"""What the ReLUs of a model leave: neurons whose activation is 0 need no row of up and no column of down.

Nothing is lost at a cut of 0: the zeros are there (ReLU Strikes Back, arXiv 2310.04564; ProSparse, arXiv 2402.13516). A
cut t > 0 is FATReLU: activations up to t are 0, too; a CETT picks it for each MLP (sparsify.relu_cuts). With another
method, relu+teal, its sparsity is for the linears that the ReLUs do not settle: attention, and the gates.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from sparsify.budget import check_share
from sparsify.errors import SparsifyError
from sparsify.methods import Facts, Method
from sparsify.neuron_cut import NeuronCut

SUMMARY = "MLP neurons that ReLU leaves above 0, or above a cut (FATReLU); relu+METHOD for the other linears"
PAPER = "ReLU Strikes Back, Mirzadeh et al. 2023, arXiv 2310.04564; ProSparse, Song et al. 2024, arXiv 2402.13516"
FACTS = Facts(
    sparsifies="up's rows and down's columns of MLPs with ReLU",
    choice="per-token",
    rule="fixed cut on the activation, 0 unless another is asked for",
    tensor_parallel=True,
    kernels=("triton", "native", "reference"),
)


@dataclass(frozen=True)
class Relu:
    """ReLU's own zeros, cut: FATReLU's t, cett: in its place, the share of an MLP's output that its cut may drop.

    sparsity: share of the other linears' bytes that `others` leaves out.
    """

    sparsity: float = 0.0
    cut: float = 0.0
    others: Method | None = field(default=None, metadata={"option": False})
    cett: float | None = None
    neuron_cut: ClassVar[NeuronCut] = "relu"

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        if not 0.0 <= self.cut < float("inf"):
            raise SparsifyError(f"the cut of a ReLU must be a finite number of at least 0, not {self.cut}")
        if self.cett is not None and not 0.0 <= self.cett < 1.0:
            raise SparsifyError(f"cett is {self.cett}: the share of an MLP's output that a cut may drop is in [0, 1)")
        if self.cett is not None and self.cut > 0.0:
            raise SparsifyError(f"cut {self.cut} and cett {self.cett} both say where a ReLU is cut: give one of them")
        if self.others is None and self.sparsity > 0.0:
            raise SparsifyError(
                f"sparsity {self.sparsity} cannot be asked of method relu, which keeps what the ReLUs leave: leave the "
                "sparsity out, raise the cut, or use relu+teal, where it is for the other linears"
            )

    @property
    def name(self) -> str:
        return "relu" if self.others is None else f"relu+{self.others.name}"

    @property
    def default_allocation(self) -> str:
        """The other method's."""
        return str(getattr(self.others, "default_allocation", "uniform"))

    @property
    def rest(self) -> Method | None:
        """The method of the other linears, at this one's sparsity."""
        return None if self.others is None else replace(self.others, sparsity=self.sparsity)


METHOD = Relu
