"""Finds the norms of a decoder's blocks whose output is the input of linears: where stage 2 of ReLU-fication acts.

By structure, as sparsify.targets: in one short forward, a module without modules inside wrote the very tensor that a
site's linears read. Not covered: blocks whose linears read the residual stream itself (OLMo2 norms what they write).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.calibration import hooked
from sparsify.linear import is_linear
from sparsify.neuron_cut import is_activation
from sparsify.short_forward import run_short, same_place
from sparsify.targets import Targets, decoder_blocks


@dataclass(frozen=True)
class Norm:
    """A norm by module name, and the linears that read its output."""

    name: str
    linears: tuple[str, ...]


def find_norms(model: PreTrainedModel, targets: Targets, tokens: Tensor) -> tuple[Norm, ...]:
    """Runs one short forward on tokens [1, S] and returns the norms in call order; also on the meta device."""
    prefix, blocks = decoder_blocks(model)
    written: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, args, y, name=f"{prefix}.{name}": written.setdefault(name, y))
        for name, module in blocks.named_modules()
        if not any(True for _ in module.children()) and _may_be_norm(module)
    ]
    read: dict[str, Tensor] = {}
    firsts = {site.names[0]: model.get_submodule(site.names[0]) for site in targets.sites}
    try:
        with hooked(firsts, read.setdefault):
            run_short(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    sites = {site.names[0]: site.names for site in targets.sites}
    found = []
    for name, y in written.items():
        linears = tuple(linear for first, x in read.items() if _same(x, y) for linear in sites[first])
        if linears:
            found.append(Norm(name, linears))
    return tuple(found)


def _may_be_norm(module: nn.Module) -> bool:
    dropout: Any = nn.modules.dropout._DropoutNd
    return not (is_linear(module) or is_activation(module) or isinstance(module, dropout))


def _same(x: Tensor, y: object) -> bool:
    return isinstance(y, Tensor) and x.numel() == y.numel() and same_place(x, y)
