"""How a converted model runs: sparse everywhere, dense in a prefill, or dense throughout for a comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import nn

from sparsify.errors import SparsifyError, suggest
from sparsify.linear import SparseConv1D, SparseLinear, SparsitySwitch

Prefill = Literal["sparse", "dense"]


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear | SparseConv1D]:
    """Returns the sparse layers of a model by module name, in module order; empty for a dense model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear | SparseConv1D)}


def switch_of(model: nn.Module) -> SparsitySwitch:
    """Returns the one switch that all sparse layers of the model share. Raises SparsifyError on a dense model."""
    for layer in sparse_layers(model).values():
        return layer.switch
    raise SparsifyError("this model has no sparse layers: convert it first, or load a converted checkpoint")


def is_divided(model: nn.Module) -> bool:
    """Whether this process holds a part of the model only, and others the rest."""
    return getattr(model, "_device_mesh", None) is not None


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Inside, every layer of the converted model runs dense; nothing to do for a model that is not converted."""
    layers = sparse_layers(model)
    if not layers:
        yield
        return
    switch = switch_of(model)
    before, switch.forced_dense = switch.forced_dense, True
    try:
        yield
    finally:
        switch.forced_dense = before


def set_prefill(model: nn.Module, prefill: str) -> None:
    """Sets how forwards of more than one token a sequence run: "sparse" (every token sparse) or "dense".

    A prompt of one token runs sparse with either: only the number of tokens tells a prefill from a decode step.
    Raises SparsifyError for another value or a dense model.
    """
    allowed = get_args(Prefill)
    if prefill not in allowed:
        raise SparsifyError(
            f"unknown prefill {prefill!r}: allowed are {', '.join(allowed)}.{suggest(prefill, allowed)}"
        )
    switch = switch_of(model)
    if switch.prefill_hook is not None:
        switch.prefill_hook.remove()
        switch.prefill_hook = None
    switch.in_prefill = False
    switch.prefill = prefill
    # On the model, so that the hook of a deep copy finds the copy's own switch.
    model.sparsity_switch = switch  # type: ignore[assignment]
    if prefill == "dense":
        switch.prefill_hook = model.register_forward_pre_hook(_notice_prefill, with_kwargs=True)


@contextmanager
def with_prefill(model: nn.Module, prefill: str) -> Iterator[None]:
    """Inside, forwards of many tokens run "sparse" or "dense", whatever the model is set to; no-op if it is dense."""
    before = switch_of(model).prefill if sparse_layers(model) else prefill
    if before == prefill:
        yield
        return
    set_prefill(model, prefill)
    try:
        yield
    finally:
        set_prefill(model, before)


def _notice_prefill(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model.sparsity_switch.in_prefill = _tokens_per_sequence(args, kwargs) > 1


def _tokens_per_sequence(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return int(kwargs[name].shape[1])
    return int(args[0].shape[1]) if args and args[0] is not None else 1
