"""Fitting ReLU-fied MLPs: the error falls, the run is deterministic, goes on where it was killed, and mixes nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers import PreTrainedModel as Model

from sparsify.calibration import Calibration
from sparsify.errors import SparsifyError
from sparsify.output_weights import output_weights
from sparsify.reconstruction import Reconstruction, reconstruct
from sparsify.relufication import check_relufiable, relufy

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
_SHORT = Reconstruction(epochs=3, batch_tokens=32)


def _llama(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval().to(dtype)


def _phi3() -> Model:
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**_SIZES, pad_token_id=0)).eval()


def _gpt2() -> Model:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=32, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def calibration() -> Calibration:
    return Calibration(torch.randint(0, 64, (12, 32), generator=torch.Generator().manual_seed(1)), "random")


@torch.no_grad()
def _logits(model: Model, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def _same(one: Model, other: Model) -> bool:
    found = other.state_dict()
    return all(torch.equal(tensor, found[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("inputs", ["converted", "dense"])
@pytest.mark.parametrize("make", [_llama, _phi3, _gpt2], ids=["gated", "fused", "ungated"])
def test_the_fitted_model_is_nearer_to_the_dense_one(make: Any, inputs: Any, calibration: Calibration) -> None:
    dense, swapped, fitted = make(), make(), make()
    relufy(swapped)
    done = reconstruct(fitted, "relu", Reconstruction(epochs=8, batch_tokens=32, inputs=inputs), calibration)
    assert len(done) == 3
    assert all(one.error < 0.7 * one.swapped_error for one in done)
    assert all(0.2 < one.zeros < 0.8 for one in done)
    expected = _logits(dense, calibration.tokens)
    errors = [(_logits(model, calibration.tokens) - expected).square().mean() for model in (swapped, fitted)]
    assert errors[1] < 0.7 * errors[0]
    # Only MLPs were trained.
    for name, tensor in fitted.state_dict().items():
        if "mlp" not in name:
            assert torch.equal(tensor, dense.state_dict()[name])


def test_reported_errors_are_those_of_the_model(calibration: Calibration) -> None:
    """The first MLP's inputs are the dense model's, so its error can be had from outside."""
    dense, fitted = _llama(torch.bfloat16), _llama(torch.bfloat16)
    done = reconstruct(fitted, "relu", _SHORT, calibration)[0]
    seen: list[Tensor] = []
    mlp: Any = dense.get_submodule("model.layers.0.mlp")
    handle = mlp.register_forward_hook(lambda _, args, y: seen.extend((args[0], y)))
    for window in calibration.tokens:
        _logits(dense, window[None])
    handle.remove()
    x, y = torch.cat(seen[::2]).float(), torch.cat(seen[1::2]).float()
    with torch.no_grad():
        found = copy.deepcopy(fitted.get_submodule("model.layers.0.mlp")).float()(x)
    assert done.error == pytest.approx(float((found - y).square().mean() / y.square().mean()), rel=1e-3)


def test_more_zeros_can_be_asked_for(calibration: Calibration) -> None:
    few = reconstruct(_llama(), "relu", _SHORT, calibration)
    many = reconstruct(_llama(), "relu", Reconstruction(epochs=3, batch_tokens=32, sparsity_weight=0.5), calibration)
    assert all(more.zeros > less.zeros + 0.02 for more, less in zip(many, few, strict=True))


def test_weights_tell_outputs_that_matter_from_those_that_do_not(calibration: Calibration) -> None:
    """Outputs of the last MLP that the head does not read have no part in the prediction."""
    model: Any = _llama()
    with torch.no_grad():
        model.lm_head.weight[:, :8] = 0.0
    mlps = check_relufiable(model, "relu").mlps
    weights = output_weights(model, mlps, calibration)[mlps[-1].down]
    assert weights.shape == (32,)
    assert float(weights.mean()) == pytest.approx(1.0)
    # They still have a part in the norm before the head.
    assert weights[:8].max() < 0.5 * weights[8:].mean()
    done = reconstruct(model, "relu", Reconstruction(epochs=3, batch_tokens=32, weighting="hessian"), calibration)
    assert done[-1].error < done[-1].swapped_error


def test_the_same_run_gives_the_same_weights(calibration: Calibration) -> None:
    one, other = _llama(), _llama()
    assert reconstruct(one, "relu", _SHORT, calibration) == reconstruct(other, "relu", _SHORT, calibration)
    assert _same(one, other)


@pytest.mark.parametrize("inputs", ["converted", "dense"])
@pytest.mark.parametrize("stop", [1, 2])
def test_stopped_it_goes_on_to_the_same_weights(
    inputs: Any, stop: int, calibration: Calibration, tmp_path: Path
) -> None:
    how = Reconstruction(epochs=2, batch_tokens=32, inputs=inputs)
    whole = _llama()
    expected = reconstruct(whole, "relu", how, calibration)

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(_llama(), "relu", how, calibration, state=tmp_path / "state", progress=interrupt)
    assert len(list((tmp_path / "state").glob("*.safetensors"))) == stop
    # A kill while the next one was written.
    (tmp_path / "state" / f"mlp-{stop:03d}.safetensors").write_bytes(b"half")
    model = _llama()
    assert reconstruct(model, "relu", how, calibration, state=tmp_path / "state") == expected
    assert _same(model, whole)
    again = _llama()
    assert reconstruct(again, "relu", how, calibration, state=tmp_path / "state") == expected
    assert _same(again, whole)


def test_states_are_not_mixed(calibration: Calibration, tmp_path: Path) -> None:
    state = tmp_path / "state"
    reconstruct(_llama(), "relu", _SHORT, calibration, state=state)
    with pytest.raises(SparsifyError, match="state of another run: settings differ"):
        reconstruct(_llama(), "relu", Reconstruction(epochs=4, batch_tokens=32), calibration, state=state)
    with pytest.raises(SparsifyError, match="state of another run: weights_sha256 differ"):
        reconstruct(_llama(torch.bfloat16), "relu", _SHORT, calibration, state=state)
    first = state / "mlp-000.safetensors"
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    with pytest.raises(SparsifyError, match=r"mlp-000\.safetensors was changed: remove"):
        reconstruct(_llama(), "relu", _SHORT, calibration, state=state)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(SparsifyError, match="other is not a state folder of a reconstruction"):
        reconstruct(_llama(), "relu", _SHORT, calibration, state=tmp_path / "other")
    assert json.loads((state / "reconstruction.json").read_text())["relufication"]["activation"] == "relu"


def test_values_that_are_not_finite_are_refused(calibration: Calibration) -> None:
    model: Any = _llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(SparsifyError, match=r"outputs of model\.layers\.0\.mlp\.down_proj are not finite"):
        reconstruct(model, "relu", _SHORT, calibration)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs is 0, it must be at least 1"),
        ({"inputs": "sparse"}, "inputs is 'sparse', allowed are converted, dense"),
        ({"weighting": "fisher"}, "weighting is 'fisher', allowed are plain, hessian"),
        ({"learning_rate": 2.0}, "learning_rate is 2.0"),
        ({"sparsity_weight": -1.0}, "sparsity_weight is -1.0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsifyError, match=said):
        Reconstruction(**options)
