"""Layers of an MLP whose neurons are chosen: gate and up by rows, down by columns (sparsify.neuron_cut).

transformers' own MLP code runs: a gate layer puts 0 where a neuron is dropped, and act(0) = 0; the layers of a prompt's
choice leave it to down's. So the products are the plain reference's, which computes what it then drops. Not covered:
fast kernels; these layers refuse every backend but the reference, except down after a gate, whose input holds zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.errors import CheckpointError, SparsifyError
from sparsify.kernels.reference import BACKEND, keep_mask, masked_linear
from sparsify.linear import SparseConv1D, SparseLayer, SparseLinear, make_sparse
from sparsify.neuron_cut import Mlp, NeuronCut, NeuronCuts, is_activation, zero_at_zero
from sparsify.prompt_choice import PromptChoices, follow_prompts
from sparsify.relu_layer import place_relu, relu_problem
from sparsify.token_cut import k_problem


class _NeuronLayer(SparseLayer):
    def bind(self, name: str | None = None) -> None:
        """Raises SparsifyError for another backend than the reference."""
        if name not in (None, BACKEND.name):
            raise SparsifyError(
                f"backend {name!r} does not run MLPs whose neurons are chosen, only {BACKEND.name!r} does: "
                "leave the backend out"
            )
        super().bind(BACKEND.name)

    def splits(self, by: str) -> bool:
        """By outputs, which are its neurons."""
        return by == "outputs"

    def _run(self, x: Tensor) -> Tensor | None:
        return None


class _Gate(_NeuronLayer):
    """The gate of an MLP, or gate and up in one: `threshold` is t, neuron i of a token is kept where |act(g_i)| > t."""

    # In a tuple, so that it is not a module of this one: the MLP has it.
    activation: tuple[nn.Module]
    fused: bool

    def neurons(self, gate: Tensor) -> Tensor:
        """Returns the neurons that are kept for the gate's outputs [..., F], bool."""
        return keep_mask(self.activation[0](gate), self.threshold)

    def neurons_of(self, x: Tensor) -> Tensor:
        """Returns the same [..., F] for the gate's input x [..., I]."""
        # Not the product of the weight: where it is offloaded, only a forward brings it.
        before, self.switch.forced_dense = self.switch.forced_dense, True
        try:
            y: Tensor = self.forward(x)
        finally:
            self.switch.forced_dense = before
        return self.neurons(y.chunk(2, dim=-1)[0] if self.fused else y)

    def keep(self, x: Tensor) -> Tensor:
        """Returns the rows that a sparse forward uses for x [..., I], bool [..., O]: the gate's own are all used."""
        neurons = self.neurons_of(x)
        gate = torch.ones_like(neurons)
        return torch.cat([gate, neurons], dim=-1) if self.fused else gate

    def splits(self, by: str) -> bool:
        """Not where gate and up are one linear: a part of its rows is not of as many neurons of both."""
        return by == "outputs" and not self.fused

    def threshold_problem(self, value: float) -> str | None:
        return f"holds the threshold {value:g} of magnitudes, it must be at least 0" if value < 0.0 else None

    def _run(self, x: Tensor) -> Tensor | None:
        if not self.switch.sparse:
            return None
        y = F.linear(x, self.tensors().weight, self.bias)
        if not self.fused:
            return torch.where(self.neurons(y), y, 0.0)
        gate, up = y.chunk(2, dim=-1)
        return torch.cat([torch.where(self.neurons(gate), gate, 0.0), up], dim=-1)


class _GatedUp(_NeuronLayer):
    """up of an MLP with a gate layer: its rows are used for the neurons that the gate keeps."""

    gate: tuple[_Gate]

    def keep(self, x: Tensor) -> Tensor:
        """Returns the rows that a sparse forward uses for x [..., I], bool [..., F]."""
        return self.gate[0].neurons_of(x)

    def threshold_problem(self, value: float) -> str | None:
        return None if value == -1.0 else f"holds {value:g}, it must be -1: up uses every input channel"


class _GatedDown(SparseLayer):
    """down of an MLP with a gate layer: a dropped neuron's input is 0, and a threshold of 0 skips its column."""

    def threshold_problem(self, value: float) -> str | None:
        return None if value == 0.0 else f"holds {value:g}, it must be 0: the gate's threshold says what is kept"


class _PromptLayer(_NeuronLayer):
    """A linear of an MLP whose neurons the prompt chooses, once for its whole sequence; `threshold` is k."""

    choices: PromptChoices
    mlp: Mlp

    @property
    def runs_sparse(self) -> bool:
        return self.switch.sparse and not self.choices.begins(self.switch.prefill)

    def keep(self, x: Tensor) -> Tensor:
        """Returns the neurons that a sparse forward uses for x [..., I], bool: rows of gate and up, columns of down."""
        return self.choices.keep(self.mlp.down, x.shape[:-1], self.threshold)

    def splits(self, by: str) -> bool:
        """Never: the prompt's k are of all the neurons."""
        return False

    def threshold_problem(self, value: float) -> str | None:
        return k_problem(value, self.mlp.neurons, self.density)


class _PromptDown(_PromptLayer):
    def _run(self, x: Tensor) -> Tensor | None:
        if self.runs_sparse:
            return masked_linear(x, self.keep(x), self.tensors())
        self.choices.add(self.mlp.down, x)
        return None


class GateLinear(_Gate, SparseLinear):  # type: ignore[misc]
    """nn.Linear [F, I], or [2F, I] with up's rows, whose outputs decide which neurons a token uses."""


class GateConv1D(_Gate, SparseConv1D):  # type: ignore[misc]
    """The same for Conv1D [I, F]."""


class GatedUpLinear(_GatedUp, SparseLinear):  # type: ignore[misc]
    """nn.Linear [F, I] of which a token uses the rows that its gate keeps."""


class GatedUpConv1D(_GatedUp, SparseConv1D):  # type: ignore[misc]
    """The same for Conv1D [I, F]."""


class GatedDownLinear(_GatedDown, SparseLinear):  # type: ignore[misc]
    """nn.Linear [O, F] of which a token uses the columns that its gate keeps."""


class GatedDownConv1D(_GatedDown, SparseConv1D):  # type: ignore[misc]
    """The same for Conv1D [F, O]."""


class PromptRowsLinear(_PromptLayer, SparseLinear):  # type: ignore[misc]
    """nn.Linear [F, I], or [2F, I], of which a sequence uses the rows that its prompt chose."""


class PromptRowsConv1D(_PromptLayer, SparseConv1D):  # type: ignore[misc]
    """The same for Conv1D [I, F]."""


class PromptDownLinear(_PromptDown, SparseLinear):  # type: ignore[misc]
    """nn.Linear [O, F] that chooses in dense tokens, and uses the columns that were chosen in sparse ones."""


class PromptDownConv1D(_PromptDown, SparseConv1D):  # type: ignore[misc]
    """The same for Conv1D [F, O]."""


def place_neuron_layers(model: nn.Module, cuts: NeuronCuts) -> None:
    """Replaces the sparse layers of the MLPs, which keep every channel, by those of the cut; k or t is still to be set.

    Raises CheckpointError for an MLP whose parts are not this model's.
    """
    modules = dict(model.named_modules())
    choices = PromptChoices()
    taken: set[str] = set()
    for mlp in cuts.mlps:
        problem = _problem_of(mlp, cuts, modules, taken)
        if problem is not None:
            raise CheckpointError(f"quantization_config has an MLP that is not this model's: {problem}")
        taken.update(mlp.linears)
        for name, layer in _place(mlp, cuts.cut, modules, choices).items():
            model.set_submodule(name, layer)
    if cuts.cut == "prompt-top-k":
        follow_prompts(model, choices)


def _place(mlp: Mlp, cut: NeuronCut, modules: dict[str, nn.Module], choices: PromptChoices) -> dict[str, nn.Module]:
    if cut == "relu":
        return place_relu(mlp, modules)
    return _place_gated(mlp, modules) if cut == "gate-threshold" else _place_prompted(mlp, modules, choices)


def _problem_of(mlp: Mlp, cuts: NeuronCuts, modules: dict[str, nn.Module], taken: set[str]) -> str | None:
    if not taken.isdisjoint(mlp.linears):
        return f"a linear of {mlp.down}'s is not a converted linear of its own: another MLP has it"
    if cuts.cut == "relu":
        return relu_problem(mlp, modules)
    rows = mlp.neurons * (2 if mlp.fused else 1)
    if mlp.down in (mlp.gate, mlp.up):
        return f"{mlp.down} is named twice"
    for name in mlp.linears:
        layer = modules.get(name)
        # The types themselves: their subclasses have another cut.
        own = type(layer) in (SparseLinear, SparseConv1D)
        if not isinstance(layer, SparseLayer) or not own or layer.rank or layer.scale is not None:
            return f"{name} is not a converted linear of its own, without another cut, scales and low rank"
        size, found = (mlp.neurons, layer.sparse_in) if name == mlp.down else (rows, layer.sparse_out)
        if size != found:
            return f"{name} has {found} {'columns' if name == mlp.down else 'rows'}, its MLP {mlp.neurons} neurons"
    if cuts.cut == "gate-threshold":
        activation = modules.get(mlp.activation)
        if mlp.gate is None or activation is None or not is_activation(activation) or not zero_at_zero(activation):
            return f"it has no gate, or {mlp.activation!r} is no activation function with act(0) = 0"
    return None


def _place_gated(mlp: Mlp, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    assert mlp.gate is not None
    gate = _remake(modules[mlp.gate], (GateLinear, GateConv1D))
    assert isinstance(gate, _Gate)
    gate.activation, gate.fused = (modules[mlp.activation],), mlp.fused
    placed = {mlp.gate: gate, mlp.down: _remake(modules[mlp.down], (GatedDownLinear, GatedDownConv1D))}
    if not mlp.fused:
        up = _remake(modules[mlp.up], (GatedUpLinear, GatedUpConv1D))
        assert isinstance(up, _GatedUp)
        up.gate = (gate,)
        placed[mlp.up] = up
    return placed


def _place_prompted(mlp: Mlp, modules: dict[str, nn.Module], choices: PromptChoices) -> dict[str, nn.Module]:
    placed: dict[str, nn.Module] = {}
    for name in mlp.linears:
        rows, columns = (PromptRowsLinear, PromptRowsConv1D), (PromptDownLinear, PromptDownConv1D)
        layer = _remake(modules[name], columns if name == mlp.down else rows)
        assert isinstance(layer, _PromptLayer)
        layer.choices, layer.mlp = choices, mlp
        placed[name] = layer
    return placed


def _remake(layer: nn.Module, kinds: tuple[type[SparseLinear], type[SparseConv1D]]) -> SparseLinear | SparseConv1D:
    assert isinstance(layer, SparseLinear | SparseConv1D)
    mended = layer.sparse_bias is not None
    made = make_sparse(layer, scaled=False, rank=0, compensated=mended, switch=layer.switch, kinds=kinds)
    made.density = layer.density
    return made
