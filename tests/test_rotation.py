"""Rotating a whole model: the same function, an ordinary dense checkpoint, the basis that was asked for."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
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
from sparsify import Calibration, SparsifyError, Teal, rotate
from sparsify.rotation import eigenbasis

_SIZE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 89,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE)),
    "llama biased tied": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZE, head_dim=16)),
}


def build(family: str) -> PreTrainedModel:
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data = torch.rand_like(parameter) + 0.5
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_function(family: str, tiny_calibration: Calibration) -> None:
    model, tokens = build(family), tiny_calibration.tokens
    expected = logits(model, tokens)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert rotate(model, tiny_calibration) is model
    # fp32 sums of other products.
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-3, atol=1e-3)
    assert float(expected.abs().max()) > 1.0
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            assert bool((parameter == 1).all())
        elif "norm" not in name and name in before and not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            assert not torch.allclose(parameter, before[name]) or "gate_proj.bias" in name or "up_proj.bias" in name


@pytest.mark.parametrize("family", ["llama biased tied", "qwen2"])
def test_it_is_saved_as_a_dense_model(family: str, tiny_calibration: Calibration, tmp_path: Path) -> None:
    model = rotate(build(family), tiny_calibration)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tiny_calibration.tokens), logits(model, tiny_calibration.tokens))
    assert again.config.tie_word_embeddings is False
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_the_residual_stream_has_its_principal_components(tiny_calibration: Calibration) -> None:
    """x̂ᵀx̂, summed over the inputs of attentions and MLPs before norm weights, is diagonal and decreasing."""
    model = rotate(build("llama"), tiny_calibration)
    seen: list[Tensor] = []
    decoder: Any = model.model
    for block in decoder.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.register_forward_hook(lambda module, args, output: seen.append(output.flatten(0, -2).double()))
    logits(model, tiny_calibration.tokens)
    x = torch.cat(seen)
    moment = x.T @ x
    assert float((moment - moment.diagonal().diag()).abs().max()) < 1e-4 * float(moment.diagonal().max())
    assert bool((moment.diagonal().diff() <= 1e-4 * moment.diagonal().max()).all())


def test_eigenbasis_is_orthonormal_by_decreasing_eigenvalue() -> None:
    x = torch.randn(100, 8, dtype=torch.float64) * torch.arange(1, 9)
    q = eigenbasis(x.T @ x)
    torch.testing.assert_close(q.T @ q, torch.eye(8, dtype=torch.float64))
    sizes = (x @ q).square().sum(0)
    assert bool((sizes.diff() < 0).all())


def test_bf16_weights_are_rounded_once(tiny_calibration: Calibration) -> None:
    model = build("llama").bfloat16()
    exact = rotate(copy.deepcopy(model).double(), tiny_calibration)
    # Both measure their own activations: the same basis needs the same moments.
    turned = rotate(copy.deepcopy(model), tiny_calibration)
    for (name, found), (_, expected) in zip(turned.named_parameters(), exact.named_parameters(), strict=True):
        assert found.dtype == torch.bfloat16, name
        assert found.shape == expected.shape, name
    expected_logits, tokens = logits(model, tiny_calibration.tokens).float(), tiny_calibration.tokens
    error = (logits(turned, tokens).float() - expected_logits).norm() / expected_logits.norm()
    # A few roundings to eight bits over two blocks.
    assert float(error) < 0.05


def test_convert_rotates_first_and_says_so(tiny_calibration: Calibration, tmp_path: Path) -> None:
    model = build("llama biased tied")
    other = rotate(copy.deepcopy(model), tiny_calibration)
    dense = logits(model, tiny_calibration.tokens)
    sparsify.convert(model, Teal(0.5), tiny_calibration, rotate=True)
    sparsify.convert(other, Teal(0.5), tiny_calibration)
    assert torch.equal(logits(model, tiny_calibration.tokens), logits(other, tiny_calibration.tokens))
    folder = sparsify.save(model, tmp_path / "saved")
    again = sparsify.load(folder)
    assert again.config.quantization_config.rotated
    assert torch.equal(logits(again, tiny_calibration.tokens), logits(model, tiny_calibration.tokens))
    assert sparsify.verify(folder) == []
    plain = sparsify.load(folder, dense=True)
    torch.testing.assert_close(logits(plain, tiny_calibration.tokens), dense, rtol=1e-3, atol=1e-3)


def test_what_it_cannot_rotate_is_refused(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval()
    with pytest.raises(SparsifyError, match=r"GPT2LMHeadModel is not one of .*use larosa with rotation='layer'"):
        rotate(other, tiny_calibration)
    sparsify.convert(tiny_llama, Teal(0.5), tiny_calibration)
    with pytest.raises(SparsifyError, match="converted already: rotate the dense model"):
        rotate(tiny_llama, tiny_calibration)
    broken = build("llama")
    broken.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(SparsifyError, match="not finite on the calibration text"):
        rotate(broken, tiny_calibration)
