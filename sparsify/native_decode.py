"""Decoding of Llama-like models on the CPU by one native call a token, behind the model's own forward and `generate`.

transformers' modelling code costs about a millisecond a block and token on a CPU, more than the weights of a small
sparse block. After `enable`, a forward of one token a sequence with a DynamicCache and nothing unusual asked of it is
one call of the native library; every other forward (a prompt, padding, hooks, attentions, gradients, compilation) runs
transformers' code as before, and both go on with the same cache. Logits differ by the order of fp32 sums only.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparsify.errors import SparsifyError
from sparsify.kernels import large_pages
from sparsify.llama_like import has_hooks
from sparsify.mapped import MappedWeights
from sparsify.native_cache import MOST_SEQUENCES, buffers_of, usable
from sparsify.native_plan import NativePlan, problem

# Positions whose rotation is computed at once.
_ANGLES = 256
# Rows of a matrix that are copied at once.
_ROWS = 1024
_KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}


def enable(model: PreTrainedModel) -> None:
    """Lets the model, dense or converted, decode natively. Raises SparsifyError where it cannot; see `problem`."""
    reason = problem(model)
    if reason is not None:
        raise SparsifyError(f"{type(model).__name__} cannot decode natively: {reason}")
    if native_forward_of(model) is None:
        _move_to_large_pages(model)
        model.forward = NativeForward(model)


def enable_where_possible(model: PreTrainedModel) -> bool:
    """The same for a model that may be of another kind; returns whether it was."""
    if problem(model) is not None:
        return False
    enable(model)
    return True


def disable(model: PreTrainedModel) -> None:
    """Gives the model its own forward back."""
    if native_forward_of(model) is not None:
        del model.__dict__["forward"]


def native_forward_of(model: PreTrainedModel) -> "NativeForward | None":
    """Returns what `enable` has put in the place of the model's forward, or None."""
    found = model.__dict__.get("forward")
    return found if isinstance(found, NativeForward) else None


@contextmanager
def transformers_path(model: PreTrainedModel) -> Iterator[None]:
    """Inside, transformers' modelling code runs for every forward; converted layers still use their kernels."""
    forward = native_forward_of(model)
    if forward is None:
        yield
        return
    before, forward.off = forward.off, True
    try:
        yield
    finally:
        forward.off = before


class NativeForward:
    """The forward of one model: the native step where the call is a plain decode step, else the class's own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.off = False
        self.steps = 0
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))
        self._plan: NativePlan | None = None
        self._angles: tuple[int, Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "NativeForward":
        # Inside a deep copy of the model, whose copy is in the memo by now; a plan points into the original.
        copied = NativeForward(memo.get(id(self.model), self.model))
        copied.off = self.off
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None, "_angles": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch.compiler.is_compiling() or self.off or args or torch.is_grad_enabled()):
            output = self._step(kwargs)
            if output is not None:
                return output
        return type(self.model).forward(self.model, *args, **kwargs)

    def _step(self, kwargs: dict[str, Any]) -> CausalLMOutputWithPast | None:
        """One native step; None where the call asks for anything else, with nothing changed."""
        ids = kwargs.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or not 0 < len(ids) <= MOST_SEQUENCES:
            return None
        if not _is_plain(self.model, kwargs):
            return None
        plan = self._current_plan()
        cache: Any = kwargs.get("past_key_values")
        layers = usable(cache, plan.windows, len(ids), plan.dtype) if plan is not None else None
        if plan is None or layers is None:
            return None
        position = int(cache.get_seq_length())
        if not _at_position(kwargs, position):
            return None
        buffers = buffers_of(cache)
        if not buffers.holds(layers):
            buffers.adopt(layers)
        buffers.make_room()
        buffers.point(plan.blocks)
        switch = getattr(self.model, "sparsity_switch", None)
        cosine, sine = self._rotation(plan, position)
        logits = plan.step(ids, cosine, sine, run_dense=switch is not None and not switch.sparse)
        buffers.append(layers, plan.windows[0])
        self.steps += 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _current_plan(self) -> NativePlan | None:
        if self._plan is None or not self._plan.is_current():
            # A model that was changed is looked at anew: it may no longer be one that can.
            self._plan = None if problem(self.model) is not None or has_hooks(self.model) else NativePlan(self.model)
            self._angles = None
        return self._plan

    def _rotation(self, plan: NativePlan, position: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [head_dim] of a position, computed by the model's own module for many positions at once."""
        if self._angles is None or not self._angles[0] <= position < self._angles[0] + _ANGLES:
            first = position // _ANGLES * _ANGLES
            positions = torch.arange(first, first + _ANGLES)[None]
            like = torch.empty(0, dtype=plan.dtype)
            cosine, sine = plan.decoder.rotary_emb(like, position_ids=positions)
            self._angles = (first, cosine[0].contiguous(), sine[0].contiguous())
        first, cosine, sine = self._angles
        return cosine[position - first], sine[position - first]


def _move_to_large_pages(model: PreTrainedModel) -> None:
    """Copies the dense matrices that a step reads as a whole, one at a time; parameters stay the objects they are."""
    mapped = MappedWeights()
    for module in model.modules():
        if type(module) is nn.Linear and not large_pages.fills_large_pages(module.weight):
            old = module.weight.data
            new = large_pages.empty(tuple(old.shape), old.dtype)
            # In pieces: a head's matrix is a large part of a small model, and would be there twice.
            for start in range(0, len(old), _ROWS):
                piece = old[start : start + _ROWS]
                new[start : start + _ROWS] = piece
                mapped.forget(piece)
            module.weight.data = new


def _is_plain(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether nothing but logits and the cache is asked for."""
    if any(value is not None and value is not False for name, value in kwargs.items() if name not in _KNOWN):
        return False
    config: Any = model.config
    asked = (config.output_attentions, config.output_hidden_states, model.training)
    return (
        not any(asked)
        and kwargs.get("use_cache", config.use_cache) is not False
        and kwargs.get("return_dict") is not False
        and isinstance(kwargs.get("logits_to_keep", 0), int)
    )


def _at_position(kwargs: dict[str, Any], position: int) -> bool:
    """Whether all sequences are at this position, with nothing masked."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != position + 1 or not bool(mask.all())):
        return False
    return positions is None or (positions.numel() > 0 and bool((positions == position).all()))
