"""Small models of the Llama kind, dense and converted, whose layers run on the Triton kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import sparsify
from sparsify import native_decode
from sparsify.calibration import Calibration
from sparsify.kernels import triton_backend
from sparsify.runtime import sparse_layers

_SIZE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE)),
    # The interpreter takes its time for every block.
    "shallow": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE | {"num_hidden_layers": 1, "num_attention_heads": 2})),
    "biased": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZE, attention_bias=True, mlp_bias=True, hidden_act="relu", tie_word_embeddings=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZE, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZE, head_dim=32)),
}

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def make_model(device: torch.device) -> MakeModel:
    """Makes a random model of a family, dense or converted by a method, on the device."""

    def make(family: str = "llama", method: Any = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(0)
        model = _FAMILIES[family]().to(dtype).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        if method is not None:
            tokens = torch.randint(3, _SIZE["vocab_size"], (2, 32))
            sparsify.convert(model, method, Calibration(tokens, "random tokens"))
            native_decode.disable(model)
        model.to(device)
        for layer in sparse_layers(model).values():
            # On a CPU the dispatch would choose the native kernels.
            layer.bind()
            layer.backend = triton_backend.BACKEND
            layer.weight.data = layer.weight.data.t().contiguous().t()
            if layer.lr_b is not None:
                layer.lr_b = layer.lr_b.t().contiguous().t()
        return model

    return make
