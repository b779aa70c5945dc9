"""What reads and writes a model's residual stream: its embeddings, its norms with the linears behind them, its writers;
and the values of its attentions.

Found by class: the Llama-like decoders of transformers, whose norms are RMSNorms, and GPT-2, GPT-Neo and OPT, whose
norms are LayerNorms. Every other model, and one of these with other parts in it, has no stream that is known here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify.targets import linear_shape

# Where a LayerNorm's bias has to stay in it, the root mean square of β/γ beside the normalised input's, which is 1.
# Above it three bits of every input are lost to a constant.
_LARGEST_SHIFT = 8.0


@dataclass(frozen=True)
class Readers:
    """A norm and the linears that read what it makes of the stream."""

    name: str
    norm: Any
    linears: tuple[Any, ...]


@dataclass(frozen=True)
class Heads:
    """The linear that makes an attention's values, in its rows from `first` on, and the one that reads its output.

    Rows and columns are by head of `size` channels; consecutive columns' heads share a head of values, all as many.
    """

    name: str
    values: Any
    first: int
    output: Any
    size: int

    @property
    def count(self) -> int:
        """The number N of heads of values."""
        return (linear_shape(self.values)[0] - self.first) // self.size


@dataclass(frozen=True)
class ResidualStream:
    """Embeddings [N, D] and writers [D, I] that are added to the stream; its readers in the blocks and at the end."""

    embeddings: tuple[Any, ...]
    writers: tuple[Any, ...]
    readers: tuple[Readers, ...]
    head: Readers
    attentions: tuple[Heads, ...]

    @property
    def is_centred(self) -> bool:
        """Whether the norms subtract the mean: LayerNorms."""
        return isinstance(self.head.norm, nn.LayerNorm)


@dataclass(frozen=True)
class _Half:
    """The attention, whose last reader makes the values, or the MLP."""

    norm: str
    readers: tuple[str, ...]
    writer: str


@dataclass(frozen=True)
class _Names:
    """Module names: of the decoder, and in it of embeddings, blocks and last norm; in a block, of its two halves."""

    decoder: str
    embeddings: tuple[str, ...]
    blocks: str
    halves: tuple[_Half, _Half]
    norm: str


_LLAMA = _Names(
    "model",
    ("embed_tokens",),
    "layers",
    (
        _Half("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
        _Half("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    ),
    "norm",
)
_GPT2 = _Names(
    "transformer",
    ("wte", "wpe"),
    "h",
    (_Half("ln_1", ("attn.c_attn",), "attn.c_proj"), _Half("ln_2", ("mlp.c_fc",), "mlp.c_proj")),
    "ln_f",
)
_GPT_NEO = _Names(
    "transformer",
    ("wte", "wpe"),
    "h",
    (
        _Half(
            "ln_1",
            ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            "attn.attention.out_proj",
        ),
        _Half("ln_2", ("mlp.c_fc",), "mlp.c_proj"),
    ),
    "ln_f",
)
_OPT = _Names(
    "model.decoder",
    ("embed_tokens", "embed_positions"),
    "layers",
    (
        _Half(
            "self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"
        ),
        _Half("final_layer_norm", ("fc1",), "fc2"),
    ),
    "final_layer_norm",
)
# The class, the package of transformers.models that it is in, the names.
_FAMILIES = {
    "LlamaForCausalLM": ("llama", _LLAMA),
    "MistralForCausalLM": ("mistral", _LLAMA),
    "Qwen2ForCausalLM": ("qwen2", _LLAMA),
    "Qwen3ForCausalLM": ("qwen3", _LLAMA),
    "GPT2LMHeadModel": ("gpt2", _GPT2),
    "GPTNeoForCausalLM": ("gpt_neo", _GPT_NEO),
    "OPTForCausalLM": ("opt", _OPT),
}
_PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList, Conv1D)


def residual_stream(model: PreTrainedModel) -> ResidualStream:
    """Returns the parts of a model for which stream_problem is None."""
    _, names = _FAMILIES[type(model).__name__]
    decoder = model.get_submodule(names.decoder)
    readers: list[Readers] = []
    writers: list[Any] = []
    attentions: list[Heads] = []
    for index, block in enumerate(decoder.get_submodule(names.blocks).children()):
        for half in names.halves:
            linears = tuple(block.get_submodule(name) for name in half.readers)
            readers.append(Readers(f"{names.blocks}.{index}.{half.norm}", block.get_submodule(half.norm), linears))
            writers.append(block.get_submodule(half.writer))
        attention, _ = names.halves
        attentions.append(_heads(f"{names.blocks}.{index}.{attention.writer}", block, attention))
    head = Readers(names.norm, decoder.get_submodule(names.norm), (model.get_submodule("lm_head"),))
    embeddings = tuple(decoder.get_submodule(name) for name in names.embeddings)
    return ResidualStream(embeddings, tuple(writers), tuple(readers), head, tuple(attentions))


def stream_problem(model: PreTrainedModel) -> str | None:
    """Returns why the residual stream of a dense model cannot be turned, in one line; None where it can."""
    return _wrong_class(model) or _wrong_config(model) or _wrong_modules(model) or _wrong_norms(model)


def folds_bias(readers: Readers) -> bool:
    """Whether the norm's bias can go into the biases of its readers: all of them have one."""
    return all(linear.bias is not None for linear in readers.linears)


def shift_of(norm: Any) -> Tensor:
    """Returns β/γ [D] of a LayerNorm in fp64, 0 where β is 0."""
    gain, bias = norm.weight.detach().double(), norm.bias.detach().double()
    return torch.where(bias == 0.0, 0.0, bias / gain)


def _heads(name: str, block: nn.Module, half: _Half) -> Heads:
    values, output = block.get_submodule(half.readers[-1]), block.get_submodule(half.writer)
    attention: Any = block.get_submodule(half.writer.rpartition(".")[0])
    # GPT-2's only reader makes queries, keys and values, as many of each.
    first = linear_shape(values)[0] - linear_shape(output)[1] if len(half.readers) == 1 else 0
    return Heads(name, values, first, output, attention.head_dim)


def _wrong_class(model: PreTrainedModel) -> str | None:
    kind = type(model)
    package, _ = _FAMILIES.get(kind.__name__, ("", None))
    if kind.__module__ != f"transformers.models.{package}.modeling_{package}":
        return f"{kind.__name__} is not one of {', '.join(_FAMILIES)} of transformers"
    return None


def _wrong_config(model: PreTrainedModel) -> str | None:
    config: Any = model.config
    if getattr(config, "add_cross_attention", False):
        return "it has cross-attention"
    if not getattr(config, "do_layer_norm_before", True):
        return "its norms stand after attention and MLP (do_layer_norm_before is false)"
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        return f"its embedding has another width ({config.word_embed_proj_dim}) than its blocks ({config.hidden_size})"
    if getattr(config, "_remove_final_layer_norm", False):
        return "it has no norm before the head"
    if not getattr(config, "layer_norm_elementwise_affine", True):
        return "its LayerNorms have no weights"
    return None


def _wrong_modules(model: PreTrainedModel) -> str | None:
    known = (type(model).__module__, "transformers.activations", "torch.nn.modules.activation")
    for name, module in model.named_modules():
        if type(module).__module__ not in known and type(module) not in _PLAIN:
            return f"{name} is a {type(module).__qualname__}, not a part of {type(model).__name__}"
        if "forward" in module.__dict__:
            return f"the forward of {name} was replaced"
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        return "the parameters have several dtypes"
    return None


def _wrong_norms(model: PreTrainedModel) -> str | None:
    stream = residual_stream(model)
    if not stream.is_centred:
        return None
    for readers in (*stream.readers, stream.head):
        # A model without weights is taken to be one that can be turned.
        if folds_bias(readers) or readers.norm.weight.is_meta:
            continue
        size = float(shift_of(readers.norm).square().mean().sqrt())
        # A comparison that is false for NaN, too.
        if not size <= _LARGEST_SHIFT:
            return (
                f"the bias of {readers.name} is {size:.3g} times its weight in root mean square, at most "
                f"{_LARGEST_SHIFT:g} can be turned where linears behind a LayerNorm have no bias"
            )
    return None
