"""MLPs are found by structure in every family that has them, and only there."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsify import SparsifyError
from sparsify.evals.neurons import layers_of
from sparsify.mlp_targets import find_mlps
from sparsify.neuron_cut import Mlp
from sparsify.targets import find_targets

_BASE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GATED = {**_BASE, "intermediate_size": 48, "num_key_value_heads": 2}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 48}
_FAMILIES: dict[str, tuple[str, dict[str, Any], str, str, bool]] = {
    "llama": ("LlamaConfig", _GATED, "model.layers.{}.mlp.act_fn", "model.layers.{}.mlp.down_proj", True),
    # The up projection is as wide as the hidden size: only its input tells it from the down projection.
    "llama-square": (
        "LlamaConfig", {**_GATED, "intermediate_size": 32}, "model.layers.{}.mlp.act_fn",
        "model.layers.{}.mlp.down_proj", True,
    ),
    "phi3": ("Phi3Config", _GATED, "model.layers.{}.mlp.activation_fn", "model.layers.{}.mlp.down_proj", True),
    "gemma2": (
        "Gemma2Config", {**_GATED, "head_dim": 8}, "model.layers.{}.mlp.act_fn", "model.layers.{}.mlp.down_proj", True
    ),
    "opt": (
        "OPTConfig", {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32}, "model.decoder.layers.{}.activation_fn",
        "model.decoder.layers.{}.fc2", False,
    ),
    "gpt-neox": (
        "GPTNeoXConfig", {**_BASE, "intermediate_size": 48}, "gpt_neox.layers.{}.mlp.act",
        "gpt_neox.layers.{}.mlp.dense_4h_to_h", False,
    ),
    "gpt2": ("GPT2Config", _GPT, "transformer.h.{}.mlp.act", "transformer.h.{}.mlp.c_proj", False),
}  # fmt: skip


def _model(config: str, options: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(getattr(transformers, config)(**options)).eval()
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 60, (1, 6))


def _found(model: PreTrainedModel, tokens: Tensor) -> tuple[Mlp, ...]:
    return find_mlps(model, find_targets(model, tokens), tokens)


@pytest.mark.parametrize("name", _FAMILIES)
def test_every_block_has_one(name: str, tokens: Tensor) -> None:
    config, options, activation, down, gated = _FAMILIES[name]
    model = _model(config, options)
    assert [(mlp.activation, mlp.down, mlp.gate is not None) for mlp in _found(model, tokens)] == [
        (activation.format(i), down.format(i), gated) for i in range(2)
    ]
    assert not any(module._forward_hooks for module in model.modules())


def test_experts_are_none_and_it_says_so(tokens: Tensor) -> None:
    model = _model("MixtralConfig", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2})
    with pytest.raises(SparsifyError, match=r"MixtralForCausalLM has no MLP .* --scope linears"):
        layers_of(model, "mlp", tokens)


def test_one_activation_module_may_serve_all_blocks(tokens: Tensor) -> None:
    model: Any = _model("LlamaConfig", _GATED)
    model.model.layers[1].mlp.act_fn = model.model.layers[0].mlp.act_fn
    assert [mlp.down for mlp in _found(model, tokens)] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_what_changes_nothing_is_no_activation(tokens: Tensor) -> None:
    model: Any = _model("LlamaConfig", _GATED)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Identity()
    assert _found(model, tokens) == ()


def test_mlps_whose_values_are_all_0_are_told_apart() -> None:
    """A pad token's embedding may be zeros, and then every MLP of a model without biases computes zeros."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    found = find_mlps(model, find_targets(model, tokens), tokens)
    assert [mlp.down for mlp in found] == [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
