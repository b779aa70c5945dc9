"""Decoders of the Llama kind, which a decode step of our own can run: whether a model is one, and stays the same one.

Found by class: Llama, Mistral, Qwen2 and Qwen3 of transformers, whose modules are known by name and by meaning. Every
other model, and one of these that was changed (an adapter, a hook, another attention), runs transformers' own code.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.linear import SparseLinear
from sparsify.relu_layer import FatRelu
from sparsify.runtime import is_divided

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
# Rotary embeddings whose angles depend on nothing but the position.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ATTENTIONS = ("sdpa", "eager")
_CAPTURE = "transformers.utils.output_capturing"


def problem_of(
    model: PreTrainedModel,
    *,
    device: str,
    dtypes: Collection[torch.dtype],
    activations: Collection[str],
    backend: str,
) -> str | None:
    """Returns why a decode step of our own cannot run this model, in one line; None where it can.

    device, dtypes, activations and backend: what that step's kernels take.
    """
    if is_divided(model):
        return "it is one part of a model that several processes hold"
    return (
        _wrong_class(model)
        or _wrong_config(model, device=device, dtypes=dtypes, activations=activations)
        or _wrong_modules(model, backend)
    )


def _wrong_class(model: PreTrainedModel) -> str | None:
    kind = type(model)
    family = kind.__name__.removesuffix("ForCausalLM")
    if family not in _FAMILIES or kind.__module__ != f"transformers.models.{family.lower()}.modeling_{family.lower()}":
        return f"{kind.__name__} is not one of {', '.join(f'{name}ForCausalLM' for name in _FAMILIES)} of transformers"
    return None


def _wrong_config(
    model: PreTrainedModel, *, device: str, dtypes: Collection[torch.dtype], activations: Collection[str]
) -> str | None:
    config: Any = model.config
    if model.device.type != device or model.dtype not in dtypes:
        needed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the model is in {model.dtype} on {model.device}: one of {needed} on {device} is needed"
    if config.hidden_act not in activations:
        return f"hidden_act {config.hidden_act!r} is not one of {', '.join(activations)}"
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        return f"rope_type {rope!r} is not one of {', '.join(_ROPE_TYPES)}"
    if config._attn_implementation not in _ATTENTIONS:
        return f"attention {config._attn_implementation!r} is not one of {', '.join(_ATTENTIONS)}"
    return None


def _wrong_modules(model: PreTrainedModel, backend: str) -> str | None:
    decoder: Any = model.model
    family = type(model).__name__.removesuffix("ForCausalLM")
    for name, module in decoder.named_modules():
        if isinstance(module, SparseLinear):
            if module.backend.name != backend:
                return f"{name} runs on the backend {module.backend.name}"
            continue
        known = type(module).__module__ in (
            type(model).__module__,
            "transformers.activations",
            "torch.nn.modules.activation",
        )
        if not known and type(module) not in (nn.Linear, nn.Embedding, nn.ModuleList, FatRelu):
            return f"{name} is a {type(module).__qualname__}, not a part of {family}"
        if "forward" in module.__dict__:
            return f"the forward of {name} was replaced"
    if type(model.lm_head) is not nn.Linear:
        return f"lm_head is a {type(model.lm_head).__qualname__}"
    if any(t.dtype != model.dtype for t in decoder.parameters()):
        return "the parameters have several dtypes"
    return None


class Watch:
    """What a model was made of when a step was prepared for it, and whether it still is."""

    def __init__(self, model: PreTrainedModel, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._pointers = [t.data_ptr() for t in tensors]
        modules = dict(model.named_modules())
        self._children = [(m._modules, name, child) for m in modules.values() for name, child in m._modules.items()]
        self._slots = [(slots, name, t) for m in modules.values() for slots, name, t in _slots(m)]
        self._hooks = _hooks_of(model)
        self._dicts = [m.__dict__ for name, m in modules.items() if name]

    def is_current(self) -> bool:
        """Whether every module, parameter and buffer is still the one that the step points to, without a hook."""
        return (
            not (any(self._hooks) and _is_hooked(self._hooks))
            and all(children.get(name) is child for children, name, child in self._children)
            and all(slots.get(name) is tensor for slots, name, tensor in self._slots)
            and [t.data_ptr() for t in self._tensors] == self._pointers
            and not any("forward" in attributes for attributes in self._dicts)
        )


def has_hooks(model: PreTrainedModel) -> bool:
    """Whether a module inside of the model has a forward hook that the native step would not call."""
    return _is_hooked(_hooks_of(model))


def _hooks_of(model: PreTrainedModel) -> list[Any]:
    inner = [module for name, module in model.named_modules() if name]
    return [hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def _is_hooked(every: list[Any]) -> bool:
    # transformers leaves its hooks for hidden states in the model once they were asked for; they do nothing otherwise.
    return any(hook.__module__ != _CAPTURE for hooks in every for hook in hooks.values())


def _slots(module: nn.Module) -> Iterator[tuple[Any, str, Tensor | None]]:
    for slots in (module._parameters, module._buffers):
        for name, tensor in slots.items():
            yield slots, name, tensor
