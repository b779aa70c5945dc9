"""A decoder of the Llama kind as the native library's structs: pointers to the model's own tensors, no copy.

Found by class: Llama, Mistral, Qwen2 and Qwen3 of transformers, whose modules this knows by name and by meaning. Every
other model, and one of these that was changed (an adapter, a hook, another attention), runs transformers' own code.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsify.kernels import library
from sparsify.kernels.native import checked
from sparsify.kernels.spec import SparseTensors
from sparsify.linear import SparseLinear

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
# Rotary embeddings whose angles depend on nothing but the position.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ATTENTIONS = ("sdpa", "eager")
_CAPTURE = "transformers.utils.output_capturing"
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def problem(model: PreTrainedModel) -> str | None:
    """Returns why the native decode step cannot run this model, in one line; None where it can."""
    if library.load() is None:
        return library.missing()
    return _wrong_class(model) or _wrong_config(model) or _wrong_modules(model)


def _wrong_class(model: PreTrainedModel) -> str | None:
    kind = type(model)
    family = kind.__name__.removesuffix("ForCausalLM")
    if family not in _FAMILIES or kind.__module__ != f"transformers.models.{family.lower()}.modeling_{family.lower()}":
        return f"{kind.__name__} is not one of {', '.join(f'{name}ForCausalLM' for name in _FAMILIES)} of transformers"
    return None


def _wrong_config(model: PreTrainedModel) -> str | None:
    config: Any = model.config
    if model.device.type != "cpu" or model.dtype not in library.DTYPES:
        return f"the model is in {model.dtype} on {model.device}: float32, bfloat16 or float16 on the CPU is needed"
    if config.hidden_act not in library.ACTIVATIONS:
        return f"hidden_act {config.hidden_act!r} is not one of {', '.join(library.ACTIVATIONS)}"
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        return f"rope_type {rope!r} is not one of {', '.join(_ROPE_TYPES)}"
    if config._attn_implementation not in _ATTENTIONS:
        return f"attention {config._attn_implementation!r} is not one of {', '.join(_ATTENTIONS)}"
    return None


def _wrong_modules(model: PreTrainedModel) -> str | None:
    decoder: Any = model.model
    family = type(model).__name__.removesuffix("ForCausalLM")
    for name, module in decoder.named_modules():
        if isinstance(module, SparseLinear):
            if module.backend.name != "native":
                return f"{name} runs on the backend {module.backend.name}"
            continue
        known = type(module).__module__ in (
            type(model).__module__,
            "transformers.activations",
            "torch.nn.modules.activation",
        )
        if not known and type(module) not in (nn.Linear, nn.Embedding, nn.ModuleList):
            return f"{name} is a {type(module).__qualname__}, not a part of {family}"
        if "forward" in module.__dict__:
            return f"the forward of {name} was replaced"
    if type(model.lm_head) is not nn.Linear:
        return f"lm_head is a {type(model.lm_head).__qualname__}"
    if any(t.dtype != model.dtype for t in decoder.parameters()):
        return "the parameters have several dtypes"
    return None


class NativePlan:
    """The structs of one model, and what tells whether they still describe it.

    Raises SparsifyError for tensors that the kernels cannot take. Call `problem` first.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model_: Any = model
        config = model_.config
        self.decoder: Any = model_.model
        self.dtype = model.dtype
        self._kept: dict[str, Tensor] = {}
        self._tensors: list[Tensor] = []
        blocks = list(self.decoder.layers)[: config.num_hidden_layers]
        self.head_dim = int(blocks[0].self_attn.head_dim)
        self.blocks = (library.CBlock * len(blocks))()
        for block, c_block in zip(blocks, self.blocks, strict=True):
            self._fill(c_block, block)
        self.struct = library.CDecoder(
            dtype=library.DTYPES[model.dtype],
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=self.head_dim,
            inner=config.intermediate_size,
            vocabulary=model_.lm_head.out_features,
            blocks=len(blocks),
            activation=library.ACTIVATIONS[config.hidden_act],
            epsilon=self.decoder.norm.variance_epsilon,
            scaling=blocks[0].self_attn.scaling,
            embedding=self._pointer(self.decoder.embed_tokens.weight),
            norm=self._pointer(self.decoder.norm.weight),
            head=self._linear(model_.lm_head),
            block=self.blocks,
        )
        self.vocabulary = int(self.struct.vocabulary)
        kinds = DynamicCache(config=config).layers
        self.windows = [getattr(layer, "sliding_window", None) for layer in kinds]
        self._watch(model)

    def _fill(self, c_block: library.CBlock, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        modules = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
        for name, module in zip(_LINEARS, modules, strict=True):
            setattr(c_block, name, self._linear(module))
        c_block.attention_norm = self._pointer(block.input_layernorm.weight)
        c_block.mlp_norm = self._pointer(block.post_attention_layernorm.weight)
        if hasattr(attention, "q_norm"):
            c_block.q_norm = self._pointer(attention.q_norm.weight)
            c_block.k_norm = self._pointer(attention.k_norm.weight)

    def _linear(self, module: nn.Module) -> library.CLinear:
        if isinstance(module, SparseLinear):
            tensors = module.tensors()
            found = checked(self.dtype, module.sparse_in, tensors)
            self._tensors += [t for t in vars(tensors).values() if isinstance(t, Tensor)]
            return found
        assert isinstance(module, nn.Linear)
        dense = SparseTensors(module.weight, module.bias, torch.zeros(()))
        found = checked(self.dtype, module.in_features, dense)
        found.threshold = None
        self._tensors += [t for t in (module.weight, module.bias) if t is not None]
        return found

    def _pointer(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def _watch(self, model: PreTrainedModel) -> None:
        self._pointers = [t.data_ptr() for t in self._tensors]
        modules = dict(model.named_modules())
        self._children = [(m._modules, name, child) for m in modules.values() for name, child in m._modules.items()]
        self._slots = [(slots, name, t) for m in modules.values() for slots, name, t in _slots(m)]
        inner = [m for name, m in modules.items() if name]
        self._hooks = _hooks_of(model)
        self._dicts = [m.__dict__ for m in inner]

    def is_current(self) -> bool:
        """Whether every module, parameter and buffer is still the one that the structs point to, without a hook."""
        return (
            not (any(self._hooks) and _is_hooked(self._hooks))
            and all(children.get(name) is child for children, name, child in self._children)
            and all(slots.get(name) is tensor for slots, name, tensor in self._slots)
            and [t.data_ptr() for t in self._tensors] == self._pointers
            and not any("forward" in attributes for attributes in self._dicts)
        )

    def step(self, tokens: Tensor, cosine: Tensor, sine: Tensor, *, run_dense: bool) -> Tensor:
        """Returns the logits [B, 1, V] of one token [B, 1] each; keys and values are appended to the structs' cache.

        cosine and sine are [head_dim] in the model's dtype. Raises IndexError for a token outside of the vocabulary.
        """
        native = library.load()
        assert native is not None
        flat = tokens.reshape(-1).to(torch.int64).contiguous()
        logits = torch.empty(len(flat), 1, self.vocabulary, dtype=self.dtype)
        status = native.sp_decode(
            ctypes.byref(self.struct),
            flat.data_ptr(),
            len(flat),
            cosine.data_ptr(),
            sine.data_ptr(),
            int(run_dense),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if status == library.NO_MEMORY:
            raise MemoryError("the native decode step got no work memory")
        if status:
            raise IndexError(f"a token of {flat.tolist()} is outside of the vocabulary of {self.vocabulary}")
        return logits


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
