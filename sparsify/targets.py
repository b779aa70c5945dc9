"""Finds what can be made sparse in any decoder: the linears in its blocks, grouped by the input they share.

By structure, not by a table of families: the blocks are the decoder's list of modules with linears, the linears are
the nn.Linear and Conv1D modules inside, and linears that receive the same tensor in a forward are one input site.
Embeddings, norms, the head, routers and 3-D expert weights stay dense; what was left and why is listed.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify.budget import LinearShape
from sparsify.calibration import hooked
from sparsify.errors import SparsifyError
from sparsify.linear import SparseLayer, is_linear
from sparsify.short_forward import is_expert_weight, run_short, same_place


@dataclass(frozen=True)
class Site:
    """The linears of one block that receive the same input [..., I]; names are module names in the model."""

    names: tuple[str, ...]
    inputs: int


@dataclass(frozen=True)
class Targets:
    """The input sites of a model in call order, and one plain statement for everything left dense in its blocks."""

    sites: tuple[Site, ...]
    left_dense: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for site in self.sites for name in site.names)


def find_targets(model: PreTrainedModel, tokens: Tensor) -> Targets:
    """Runs one short forward on tokens [1, S] and returns the sites of the model, which may be on the meta device.

    Raises SparsifyError where the model has no decoder blocks or no linears in them.
    """
    prefix, blocks = decoder_blocks(model)
    linears = {f"{prefix}.{name}": module for name, module in blocks.named_modules() if is_linear(module)}
    routers = {name for name, module in linears.items() if _is_router(model, module)}
    called = _record_inputs(model, {n: m for n, m in linears.items() if n not in routers}, tokens)
    sites = _group(called, linears)
    if not sites:
        raise SparsifyError(
            f"{type(model).__name__} has no linears that a forward reaches in its {len(blocks)} blocks: "
            "there is nothing to convert"
        )
    return Targets(tuple(sites), tuple(_left_dense(prefix, blocks, linears, routers, called)))


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Returns (outputs, inputs) of an nn.Linear or a Conv1D."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    assert isinstance(linear, nn.Linear)
    return linear.out_features, linear.in_features


def linear_shapes(model: PreTrainedModel, targets: Targets) -> dict[str, LinearShape]:
    """Returns the shapes of the targets in module order, the order of recipes and reports, not in call order."""
    found = set(targets.names)
    modules = {name: module for name, module in model.named_modules() if name in found}
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    read: dict[str, int] = {}
    for site in targets.sites:
        outputs = sum(linear_shape(modules[name])[0] for name in site.names)
        # By structure: what reads the residual stream widens it, what writes to it does not.
        read |= dict.fromkeys(site.names, outputs if outputs > site.inputs == width else 0)
    return {
        name: LinearShape(*linear_shape(module), dense_weight(module).element_size(), read[name])
        for name, module in modules.items()
    }


def dense_weight(linear: nn.Module) -> Tensor:
    """Returns the weight as [O, I], a view for a Conv1D, which stores [I, O]."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(linear, Conv1D) else weight


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Returns the text decoder: embedding, blocks and last norm, without a head or a vision tower."""
    decoder = cast(Any, model).get_decoder()
    assert isinstance(decoder, nn.Module)
    return decoder


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Returns the module name of the list of decoder blocks, and the list."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(map(_is_converted_or_linear, module.modules()))
    ]
    # A model with a vision tower has several lists: the decoder's are in it, its length in the text configuration.
    inside = set(decoder_of(model).modules())
    lists = [entry for entry in lists if entry[1] in inside] or lists
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    candidates = [entry for entry in lists if len(entry[1]) == depth] or lists
    if not candidates:
        raise SparsifyError(
            f"{type(model).__name__} has no list of decoder blocks with linears in it; "
            "sparsify converts decoder-only language models of transformers"
        )
    # Of nested lists the outer one is named first.
    return candidates[0]


def _is_converted_or_linear(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, SparseLayer)


def _is_router(model: PreTrainedModel, linear: nn.Module) -> bool:
    config = model.config.get_text_config(decoder=True)
    experts = {getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")}
    outputs, _ = linear_shape(linear)
    return outputs == 1 or outputs in experts - {None}


def _record_inputs(model: PreTrainedModel, linears: dict[str, nn.Module], tokens: Tensor) -> list[tuple[str, Tensor]]:
    """Returns (name, input) of every linear that a forward calls, in call order; a second call is not listed."""
    calls: dict[str, Tensor] = {}
    with hooked(linears, calls.setdefault):
        run_short(model, tokens)
    return list(calls.items())


def _group(called: list[tuple[str, Tensor]], linears: dict[str, nn.Module]) -> list[Site]:
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in called:
        for known, names in groups:
            # All inputs are alive here, so the same storage means the same tensor, viewed or not.
            if known.numel() == x.numel() and same_place(known, x):
                names.append(name)
                break
        else:
            groups.append((x, [name]))
    return [Site(tuple(names), linear_shape(linears[names[0]])[1]) for _, names in groups]


def _left_dense(
    prefix: str,
    blocks: nn.ModuleList,
    linears: dict[str, nn.Module],
    routers: set[str],
    called: list[tuple[str, Tensor]],
) -> list[str]:
    statements = []
    if routers:
        statements.append(f"{len(routers)} router or gate linears, which choose experts: {_names(routers)}")
    unreached = set(linears) - routers - {name for name, _ in called}
    if unreached:
        statements.append(f"{len(unreached)} linears that the forward did not reach: {_names(unreached)}")
    experts = [
        f"{prefix}.{name}.{key}"
        for name, module in blocks.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if is_expert_weight(module, parameter)
    ]
    if experts:
        statements.append(f"{len(experts)} expert weights, stored as 3-D tensors, left dense: {_names(set(experts))}")
    return statements


def _names(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
