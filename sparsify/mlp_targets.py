"""Finds the MLPs of a decoder: which linears make its neurons, which one reads them, and the activation between them.

By structure, as sparsify.targets: in one short forward, an activation module reads what a linear wrote, and a linear
reads that activation, alone (ungated) or times what a second linear of the same input wrote (gated). Gate and up may
be one linear, the gate's rows first (Phi-3). Not covered: experts, which see a part of the tokens; up's rows first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.errors import SparsifyError
from sparsify.neuron_cut import Mlp, NeuronCut, is_activation, zero_at_zero
from sparsify.short_forward import Products, run_short, same_place
from sparsify.targets import Targets


@dataclass(frozen=True)
class _Call:
    """One forward of a module, its input and output [..., N]."""

    name: str
    x: Tensor
    y: Tensor


def find_mlps(model: PreTrainedModel, targets: Targets, tokens: Tensor) -> tuple[Mlp, ...]:
    """Runs one short forward on tokens [1, S] and returns the MLPs whose linears are targets, in call order.

    The model may be on the meta device: an MLP is told by which tensors are read, not by their values.
    """
    linears = {name: model.get_submodule(name) for name in targets.names}
    activations = {name: module for name, module in model.named_modules() if is_activation(module)}
    products = Products()
    calls = _record(model, linears | activations, tokens, products)
    linear_calls = {call.name: call for call in calls if call.name in linears}
    sites = {name: site.names for site in targets.sites for name in site.names}
    found = []
    for index, call in enumerate(calls):
        if call.name in activations and call.x[..., 0].numel() == tokens.numel():
            later = [other for other in calls[index + 1 :] if other.name in linears]
            found.append(_mlp_of(call, linear_calls, later, sites, products))
    return tuple(mlp for mlp in found if mlp is not None)


def cut_mlps(model: PreTrainedModel, mlps: Sequence[Mlp], cut: NeuronCut, method: str) -> tuple[Mlp, ...]:
    """Returns the MLPs that a cut can be made in. Raises SparsifyError where there is none."""
    if cut == "prompt-top-k":
        kept, needed, other = tuple(mlps), "an MLP, down(act(up x)) or down(act(gate x) · up x)", "teal"
    else:
        kept = tuple(m for m in mlps if m.gate is not None and zero_at_zero(model.get_submodule(m.activation)))
        needed, other = "a gated MLP, down(act(gate x) · up x)", "griffin or teal"
    if not kept:
        raise SparsifyError(
            f"method {method} cuts the neurons of MLPs, and no block of {type(model).__name__} has {needed}"
            f", of linears that can be converted: use method {other}"
        )
    return kept


def _record(model: PreTrainedModel, modules: dict[str, nn.Module], tokens: Tensor, products: Products) -> list[_Call]:
    calls: list[_Call] = []
    handles = []
    for name, module in modules.items():

        def see(module: nn.Module, args: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
            calls.append(_Call(name, args[0], y))

        handles.append(module.register_forward_hook(see))
    try:
        run_short(model, tokens, products)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _mlp_of(
    activation: _Call,
    linears: dict[str, _Call],
    later: Sequence[_Call],
    sites: dict[str, tuple[str, ...]],
    products: Products,
) -> Mlp | None:
    source = next((call for call in linears.values() if _reads(activation.x, call.y)), None)
    if source is None:
        return None
    neurons = activation.x.shape[-1]
    if source.y.shape[-1] == 2 * neurons:
        down = _reader(products.of(activation.y, source.y[..., neurons:]), later)
        return None if down is None else Mlp(source.name, down, activation.name, neurons, source.name)
    down = _reader((activation.y,), later)
    if down is not None:
        return Mlp(source.name, down, activation.name, neurons)
    for up in sites[source.name]:
        if up != source.name and linears[up].y.shape == activation.y.shape:
            down = _reader(products.of(activation.y, linears[up].y), later)
            if down is not None:
                return Mlp(up, down, activation.name, neurons, source.name)
    return None


def _reads(x: Tensor, y: Tensor) -> bool:
    """Whether x [..., F] is y, or the first half of each row of it."""
    return same_place(x, y) and x.shape[:-1] == y.shape[:-1] and y.shape[-1] in (x.shape[-1], 2 * x.shape[-1])


def _reader(neurons: Iterable[Tensor], linears: Sequence[_Call]) -> str | None:
    """Returns the first linear whose input is one of these tensors [..., F]."""
    found = (call for h in neurons for call in linears if call.x.numel() == h.numel() and same_place(call.x, h))
    return next((call.name for call in found), None)
