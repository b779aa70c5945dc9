"""Finds the MLPs of any decoder by structure: an activation between linears, whatever the modules are called.

One short forward is watched. An activation is a module without weights that changes a linear's output element by
element; the MLP's down projection is the next linear whose input is new and as wide. Gated, ungated and fused gate-up
MLPs are found alike. Not covered: experts stored as 3-D tensors, and activations that are called as functions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.errors import SparsifyError
from sparsify.linear import is_linear
from sparsify.targets import decoder_blocks


@dataclass(frozen=True)
class MLP:
    """One MLP by its modules' names: the output of `activation` is s [..., I], the input of `down` is h [..., I].

    gated: h is s times something else; otherwise h is s.
    """

    activation: str
    down: str
    gated: bool


@dataclass(frozen=True)
class _Call:
    """One forward of a module; its tensors are kept alive, so that equal storage means the same tensor."""

    name: str
    linear: bool
    x: Tensor
    y: Tensor


def find_mlps(model: PreTrainedModel, tokens: Tensor) -> tuple[MLP, ...]:
    """Runs one short forward on tokens [1, S] and returns the MLPs of the model in call order.

    Raises SparsifyError for a model without decoder blocks, or without an MLP that can be found in them.
    """
    prefix, blocks = decoder_blocks(model)
    calls: list[_Call] = []
    modules = {f"{prefix}.{name}": module for name, module in blocks.named_modules()}
    with _recorded(modules, calls), torch.inference_mode():
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    found = tuple(_pair(calls))
    if not found:
        raise SparsifyError(
            f"{type(model).__name__} has no MLP that can be found in its {len(blocks)} blocks (an activation module "
            "between two linears; experts stored as 3-D tensors are none): measure every linear with --scope linears"
        )
    return found


def _pair(calls: list[_Call]) -> Iterator[MLP]:
    """Yields each activation with the down projection that follows it."""
    inputs: set[int] = set()
    outputs: set[int] = set()
    downs: set[str] = set()
    activation: _Call | None = None
    for call in calls:
        if not call.linear:
            if _storage(call.x) in outputs and not torch.equal(call.x, call.y):
                activation = call
            continue
        outputs.add(_storage(call.y))
        s = activation.y if activation is not None else None
        # The up projection also comes after the activation, but its input is the gate projection's.
        if s is not None and call.x.shape[-1] == s.shape[-1] and _storage(call.x) not in inputs:
            assert activation is not None
            if call.name not in downs:
                yield MLP(activation.name, call.name, gated=not torch.equal(call.x.flatten(), s.flatten()))
            downs.add(call.name)
            activation = None
        inputs.add(_storage(call.x))


@contextmanager
def _recorded(modules: dict[str, nn.Module], calls: list[_Call]) -> Iterator[None]:
    """Inside, forwards of linears and of elementwise modules without weights are appended to calls."""
    handles = []
    for name, module in modules.items():
        linear = is_linear(module)
        if not linear and not _may_be_activation(module):
            continue

        def record(module: nn.Module, args: tuple[Any, ...], y: Any, name: str = name, linear: bool = linear) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and isinstance(y, Tensor) and (linear or x.shape == y.shape):
                calls.append(_Call(name, linear, x, y))

        handles.append(module.register_forward_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _may_be_activation(module: nn.Module) -> bool:
    # xIELU has two learned numbers; a norm has one for each channel.
    return not any(True for _ in module.children()) and all(p.numel() == 1 for p in module.parameters())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
