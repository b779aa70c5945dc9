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
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import sparsify
from sparsify import Calibration, SparsifyError, Teal, rotate
from sparsify.rotation import centred_eigenbasis, eigenbasis, rotation_problem

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
_GPT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_heads": 6,
    "num_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_OPT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 89,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
CENTRED: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2 tied": lambda: GPT2LMHeadModel(
        GPT2Config(**_GPT | {"n_head": 6, "n_layer": 2, "n_inner": 89}, tie_word_embeddings=True)
    ),
    "gpt-neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(**_GPT, attention_types=[[["global", "local"], 1]], window_size=8, tie_word_embeddings=False)
    ),
    "gpt-neo tied": lambda: GPTNeoForCausalLM(GPTNeoConfig(**_GPT, attention_types=[[["global", "local"], 1]])),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT, tie_word_embeddings=False)),
    "opt tied": lambda: OPTForCausalLM(OPTConfig(**_OPT)),
    "opt without biases": lambda: OPTForCausalLM(OPTConfig(**_OPT, enable_bias=False)),
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE)),
    "llama biased tied": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZE, head_dim=16)),
    **CENTRED,
}


def build(family: str) -> PreTrainedModel:
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or "bias" in name:
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
        if name.endswith(("layernorm.weight", "layer_norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
            assert bool((parameter == 1).all()), name
        elif parameter.dim() == 2 and name in before:
            assert not torch.allclose(parameter, before[name]), name


@pytest.mark.parametrize("family", ["llama biased tied", "qwen2", *CENTRED])
def test_it_is_saved_as_a_dense_model(family: str, tiny_calibration: Calibration, tmp_path: Path) -> None:
    model = rotate(build(family), tiny_calibration)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tiny_calibration.tokens), logits(model, tiny_calibration.tokens))
    assert again.config.tie_word_embeddings is False
    assert again.lm_head.weight is not again.get_input_embeddings().weight


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


@pytest.mark.parametrize("family", ["llama", "gpt2 tied", "gpt-neo"])
def test_attention_outputs_have_theirs_by_head_of_values(family: str, tiny_calibration: Calibration) -> None:
    model = rotate(build(family), tiny_calibration)
    seen: list[Tensor] = []
    output: Any = model.get_submodule(
        {
            "llama": "model.layers.1.self_attn.o_proj",
            "gpt2 tied": "transformer.h.1.attn.c_proj",
            "gpt-neo": "transformer.h.1.attn.attention.out_proj",
        }[family]
    )
    output.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).double()))
    logits(model, tiny_calibration.tokens)
    count = 2 if family == "llama" else 6
    x = torch.cat(seen)
    for head in x.view(len(x), count, -1, 8).unbind(1):
        moment = torch.einsum("tgi,tgj->ij", head, head)
        largest = float(moment.diagonal().max())
        assert float((moment - moment.diagonal().diag()).abs().max()) < 1e-4 * largest
        assert bool((moment.diagonal().diff() <= 1e-4 * largest).all())


def test_eigenbasis_is_orthonormal_by_decreasing_eigenvalue() -> None:
    x = torch.randn(100, 8, dtype=torch.float64) * torch.arange(1, 9)
    q = eigenbasis(x.T @ x)
    torch.testing.assert_close(q.T @ q, torch.eye(8, dtype=torch.float64))
    sizes = (x @ q).square().sum(0)
    assert bool((sizes.diff() < 0).all())


def test_centred_eigenbasis_keeps_means_and_is_nearly_principal() -> None:
    x = torch.randn(400, 8, dtype=torch.float64) @ (torch.randn(8, 8, dtype=torch.float64) * torch.arange(1, 9))
    x -= x.mean(-1, keepdim=True)
    q = centred_eigenbasis(x.T @ x)
    ones = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(q.T @ q, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(q.T @ ones, ones)
    z = x @ q
    total = z[:, -1] * 8**0.5
    scores = z[:, :-1] + (total / (8 - 8**0.5))[:, None]
    moment = scores.T @ scores
    torch.testing.assert_close(scores.sum(-1), total)
    torch.testing.assert_close(moment, moment.diagonal().diag(), rtol=0, atol=1e-9 * float(moment.max()))
    assert bool((moment.diagonal().diff() < 0).all())


def test_a_layer_norm_bias_goes_into_biases_where_there_are_any(tiny_calibration: Calibration) -> None:
    model: Any = build("gpt2 tied")
    model.transformer.h[0].ln_2.weight.data[:5] = 0.0
    expected = logits(model, tiny_calibration.tokens)
    rotate(model, tiny_calibration)
    torch.testing.assert_close(logits(model, tiny_calibration.tokens), expected, rtol=1e-3, atol=1e-3)
    assert not bool(model.transformer.h[0].ln_2.bias.any())
    # The head has none.
    assert bool(model.transformer.ln_f.bias.all())


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


@pytest.mark.parametrize("family", ["llama biased tied", "gpt-neo tied"])
def test_convert_rotates_first_and_says_so(family: str, tiny_calibration: Calibration, tmp_path: Path) -> None:
    model = build(family)
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
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=128, **size)).eval()
    with pytest.raises(SparsifyError, match=r"GPTNeoXForCausalLM is not one of .*use larosa with rotation='layer'"):
        rotate(other, tiny_calibration)
    sparsify.convert(tiny_llama, Teal(0.5), tiny_calibration)
    with pytest.raises(SparsifyError, match="converted already: rotate the dense model"):
        rotate(tiny_llama, tiny_calibration)
    broken = build("llama")
    broken.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(SparsifyError, match="not finite on the calibration text"):
        rotate(broken, tiny_calibration)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_layer_norm_before": False}, "norms stand after attention and MLP"),
        ({"word_embed_proj_dim": 24}, r"another width \(24\) than its blocks \(48\)"),
        ({"_remove_final_layer_norm": True}, "no norm before the head"),
        ({"layer_norm_elementwise_affine": False}, "LayerNorms have no weights"),
    ],
)
def test_an_opt_of_another_structure_is_refused(
    config: dict[str, Any], message: str, tiny_calibration: Calibration
) -> None:
    model = OPTForCausalLM(OPTConfig(**_OPT | config)).eval()
    with pytest.raises(SparsifyError, match=rf"{message}.*rotation='layer'"):
        rotate(model, tiny_calibration)


@pytest.mark.parametrize("gain", [0.0, 1e-4, float("nan")])
def test_a_bias_without_a_gain_is_refused_where_readers_have_no_bias(gain: float) -> None:
    model: Any = build("gpt-neo")
    assert rotation_problem(model) is None
    model.transformer.h[1].ln_2.weight.data[3] = 0.0
    assert rotation_problem(model) is None
    model.transformer.h[1].ln_1.weight.data[3] = gain
    assert "the bias of h.1.ln_1 is" in str(rotation_problem(model))


def test_other_modules_and_other_weights_are_refused() -> None:
    model: Any = build("gpt-neo")
    model.transformer.h[0].mlp.c_fc = torch.nn.Sequential(model.transformer.h[0].mlp.c_fc)
    assert "mlp.c_fc is a Sequential, not a part of GPTNeoForCausalLM" in str(rotation_problem(model))
    model = build("gpt2 tied")
    model.transformer.ln_f.double()
    assert "several dtypes" in str(rotation_problem(model))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True))
    assert "cross-attention" in str(rotation_problem(model))
