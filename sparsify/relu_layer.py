"""Parts of an MLP whose activation is a ReLU: the neurons that it turns off need no row of up and no column of down.

transformers' own MLP code runs. ReLU itself becomes FatRelu, whose cut is the up layer's threshold; with a cut of 0 it
is ReLU, and nothing is lost. Other kinds (ReLU², shifted, dReLU: sparsify.activations) stay, and the threshold says up
to which gate they are 0. down is an ordinary sparse layer that skips the columns of inputs that are 0. up is
computed in full where the MLP runs module by module; a decode step of our own reads only the rows of active neurons.
An ungated MLP has no rows to skip: its down's threshold is the cut. Not covered: gate and up in one linear, whose up is
always computed.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.activations import is_zero_below
from sparsify.kernels.dispatch import select_backend
from sparsify.kernels.spec import SparseTensors
from sparsify.linear import SparseConv1D, SparseLayer, SparseLinear, make_sparse
from sparsify.neuron_cut import Mlp


class FatRelu(nn.ReLU):
    """act(g) = g where g > t, else 0 (FATReLU, arXiv 2402.13516 eq. 4); ReLU in dense forwards, and where t is 0."""

    def __init__(self, up: "ReluUpLinear") -> None:
        super().__init__()
        # In a tuple, so that it is not a module of this one: the MLP has it.
        self._up = (up,)

    def forward(self, g: Tensor) -> Tensor:
        up = self._up[0]
        if not up.switch.sparse:
            return F.relu(g)
        # Not the product of the two: a threshold rounded to bf16 would be another one.
        return torch.where(g.float() <= up.threshold, 0.0, g).to(g.dtype)


class ReluUpLinear(SparseLinear):
    """up of a gated MLP [F, I], row-major: a token needs the rows of neurons whose gate is above `threshold`, t."""

    gate: tuple[SparseLayer]
    lends_buffers = True

    @property
    def cut(self) -> Tensor:
        """FATReLU's t, fp32, one value."""
        return self.threshold

    def bind(self, name: str | None = None) -> None:
        """Chooses the backend as every layer; the weight stays in rows, whatever that one wants."""
        outputs, inputs = self.weight.shape
        self.backend = select_backend(self.weight.device, self.weight.dtype, inputs, outputs, name=name)
        self.backend_name = name
        if not self.weight.is_meta and not self.weight.is_contiguous():
            self.weight.data = self.weight.data.contiguous()

    def tensors(self) -> SparseTensors:
        """Returns the linear with every channel of its input kept: the threshold is of the gate."""
        return SparseTensors(self.weight, self.bias, self.threshold.new_full((), -1.0))

    def keep(self, x: Tensor) -> Tensor:
        """Returns the rows that a token x [..., I] needs, bool [..., F]."""
        g: Tensor = self.gate[0].forward(x)
        return ~(g.float() <= self.threshold)

    def splits(self, by: str) -> bool:
        """By outputs, which are its neurons."""
        return by == "outputs"

    def threshold_problem(self, value: float) -> str | None:
        return None if value >= 0.0 else f"holds the cut {value:g} of a ReLU, it must be at least 0"

    def _run(self, x: Tensor) -> Tensor | None:
        return None


def is_relu(activation: nn.Module | None) -> bool:
    """Whether the module is ReLU itself, one with a cut, or another kind that is 0 up to some input."""
    return type(activation) is FatRelu or is_zero_below(activation)


def place_relu(mlp: Mlp, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns what takes the place of a gated MLP's up and activation; {} where there are no rows to skip."""
    if mlp.gate is None or mlp.fused:
        return {}
    gate, plain = modules[mlp.gate], modules[mlp.up]
    assert isinstance(gate, SparseLayer)
    assert isinstance(plain, SparseLinear)
    kinds = (ReluUpLinear, SparseConv1D)
    up = make_sparse(plain, scaled=False, rank=0, switch=plain.switch, kinds=kinds)
    assert isinstance(up, ReluUpLinear)
    up.density, up.gate = plain.density, (gate,)
    cut = {mlp.activation: FatRelu(up)} if type(modules[mlp.activation]) in (nn.ReLU, FatRelu) else {}
    return {mlp.up: up, **cut}


def relu_problem(mlp: Mlp, modules: Mapping[str, nn.Module]) -> str | None:
    """Returns why an MLP cannot be placed, in one line: its activation, or an up and a down with another cut."""
    if not is_relu(modules.get(mlp.activation)):
        return f"{mlp.activation!r} is not ReLU"
    for name in dict.fromkeys((mlp.up, mlp.down)) if not mlp.fused else (mlp.down,):
        layer = modules.get(name)
        if not isinstance(layer, SparseLayer) or layer.rank or layer.scale is not None:
            return f"{name} is not a converted linear without scales and low rank"
        if name == mlp.up and mlp.gate is not None and type(layer) is not SparseLinear:
            return f"{name} is not a linear of the kind that has rows to skip"
        neurons = layer.sparse_in if name == mlp.down else layer.sparse_out
        if neurons != mlp.neurons:
            return f"{name} has {neurons} neurons, its MLP {mlp.neurons}"
    if mlp.gate is not None and not isinstance(modules.get(mlp.gate), SparseLayer):
        return f"{mlp.gate} is not a converted linear"
    return None
