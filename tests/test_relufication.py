"""The swap of activations: in modules and configuration, saved and loaded by transformers alone, and refusals."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from sparsify.errors import SparsifyError
from sparsify.relufication import relufy

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
_FAMILIES: dict[str, tuple[Any, str]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)), "hidden_act"),
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**_SIZES)), "hidden_act"),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**_SIZES, head_dim=8)), "hidden_activation"),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)),
        "activation_function",
    ),
    "gpt-neo": (
        lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                hidden_size=32, num_layers=2, num_heads=4, vocab_size=64, max_position_embeddings=32,
                attention_types=[[["global", "local"], 1]],
            )
        ),
        "activation_function",
    ),
}  # fmt: skip


def _make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = _FAMILIES[family][0]()
    return model.eval()


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(torch.arange(1, 17)[None], use_cache=False).logits
    return logits


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("family", _FAMILIES)
def test_modules_and_configuration_say_the_same(family: str, activation: str, tmp_path: Path) -> None:
    model = _make(family)
    before = _logits(model)
    weights = copy.deepcopy(model.state_dict())
    mlps = relufy(model, activation)
    assert len(mlps) == 2
    swapped = _logits(model)
    assert not torch.equal(before, swapped)
    assert getattr(model.config, _FAMILIES[family][1]) == activation
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), swapped)


@pytest.mark.parametrize(("activation", "power"), [("relu", 1), ("relu2", 2)])
def test_the_function_is_the_papers(activation: str, power: int) -> None:
    model: Any = _make("llama")
    relufy(model, activation)
    mlp = model.model.layers[1].mlp
    x = torch.randn(3, 32)
    with torch.no_grad():
        gate, up, down = (linear.weight.double() for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        expected = (gate @ x.double().T).clamp_min(0) ** power * (up @ x.double().T)
        torch.testing.assert_close(mlp(x).double(), (down @ expected).T, rtol=1e-4, atol=1e-6)


def test_transformers_alone_loads_the_same_model(tmp_path: Path) -> None:
    model = _make("llama")
    relufy(model)
    model.save_pretrained(tmp_path / "plain")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'plain')!r})\n"
        "assert 'sparsify.plugin' not in sys.modules\n"
        f"torch.save(model(torch.arange(1, 17)[None], use_cache=False).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "SPARSIFY_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), _logits(model))


def _tanh() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SIZES, hidden_act="tanh"))


def _unnamed() -> PreTrainedModel:
    model: Any = LlamaForCausalLM(LlamaConfig(**_SIZES))
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    return model


@pytest.mark.parametrize(
    ("make", "activation", "said"),
    [
        (lambda: _make("llama"), "rellu", r"unknown activation 'rellu': allowed are relu, .*\. Did you mean 'relu'"),
        (lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, hidden_act="relu")), "relu", "ReLU, which has zeros already"),
        (_tanh, "relu", r"Tanh, which has no ReLU counterpart: it is -1 at -100 and 1 at 100"),
        (_unnamed, "relu", r"does not say that its MLPs have GELU under hidden_act"),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=2, head_dim=8)), "relu",
            "no block of MixtralForCausalLM has an MLP",
        ),
        (
            lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)), "relu",
            "no block of BloomForCausalLM has an MLP",
        ),
    ],
    ids=["unknown", "relu", "tanh", "unnamed", "experts", "function"],
)  # fmt: skip
def test_what_cannot_be_swapped_stays_as_it_is(make: Any, activation: str, said: str) -> None:
    model = make().eval()
    before, config = _logits(model), model.config.to_dict()
    with pytest.raises(SparsifyError, match=said):
        relufy(model, activation)
    assert torch.equal(_logits(model), before)
    assert model.config.to_dict() == config
