"""CATS against its paper's equations, written out in plain loops on the reference model's activations."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsify
from sparsify import Calibration, Cats, SparsifyError
from sparsify.calibration import hooked
from sparsify.evals.realised import RealisedDensity
from sparsify.native_decode import native_forward_of
from sparsify.runtime import set_prefill, sparse_layers

MLP = "model.layers.3.mlp"


@pytest.fixture(scope="module")
def converted(trained: PreTrainedModel, trained_calibration: Calibration) -> PreTrainedModel:
    """The reference model at 40%; to be read only."""
    return sparsify.convert(copy.deepcopy(trained), Cats(sparsity=0.4), trained_calibration)


@pytest.fixture(scope="module")
def mlp_inputs(trained: PreTrainedModel, trained_calibration: Calibration) -> Tensor:
    """What enters the MLP of block 3 [T, D] on the calibration text."""
    seen: list[Tensor] = []
    with torch.no_grad(), hooked({MLP: trained.get_submodule(MLP)}, lambda _, x: seen.append(x.flatten(0, -2))):
        for window in trained_calibration.tokens:
            trained(window[None], use_cache=False)
    return torch.cat(seen)


def test_output_is_the_papers_equations_on_real_activations(converted: PreTrainedModel, mlp_inputs: Tensor) -> None:
    mlp: Any = converted.get_submodule(MLP)
    gate, up, down = (layer.weight.detach().double() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    t, x = float(mlp.gate_proj.threshold), mlp_inputs[:6].double()
    expected, kept = torch.zeros(len(x), down.shape[0], dtype=torch.float64), 0
    for n, row in enumerate(x):
        for i in range(len(gate)):
            g = float(gate[i] @ row)
            v = g / (1.0 + math.exp(-g))
            if abs(v) > t:
                kept += 1
                expected[n] += down[:, i] * v * float(up[i] @ row)
    assert 0.02 < kept / (len(x) * len(gate)) < 0.4
    with torch.no_grad():
        found = mlp(mlp_inputs[:6])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_threshold_is_the_papers_quantile(
    converted: PreTrainedModel, trained: PreTrainedModel, mlp_inputs: Tensor
) -> None:
    with torch.no_grad():
        v = torch.nn.functional.silu(trained.get_submodule(f"{MLP}.gate_proj")(mlp_inputs)).abs().double()
    density = converted.config.quantization_config.linears[f"{MLP}.up_proj"].density
    t = float(sparse_layers(converted)[f"{MLP}.gate_proj"].threshold)
    quantile = v.flatten().sort().values[round((1 - density) * v.numel())]
    # Histogram bins are 0.4% wide.
    assert t == pytest.approx(float(quantile), rel=0.005)
    assert float((v > t).double().mean()) == pytest.approx(density, abs=0.003)


def test_the_mean_of_what_is_dropped_is_given_back(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path
) -> None:
    name, tokens = "model.layers.0.mlp", tiny_calibration.tokens
    dense, seen = copy.deepcopy(tiny_llama).get_submodule(name), []
    with torch.no_grad(), hooked({name: tiny_llama.get_submodule(name)}, lambda _, x: seen.append(x.flatten(0, -2))):
        for window in tokens:
            tiny_llama(window[None], use_cache=False)
    x = torch.cat(seen)
    model = sparsify.convert(tiny_llama, Cats(0.3, compensate=True), tiny_calibration)
    mlp: Any = model.get_submodule(name)
    t, dropped = float(mlp.gate_proj.threshold), torch.zeros(96, dtype=torch.float64)
    gate, up, down = (part.weight.detach().double() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    for row in x.double():
        for i in range(96):
            g = float(gate[i] @ row)
            v = g / (1.0 + math.exp(-g))
            if abs(v) <= t:
                dropped[i] += v * float(up[i] @ row)
    bias = down @ (dropped / len(x))
    torch.testing.assert_close(mlp.down_proj.sparse_bias.double(), bias, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        missing = dense(x) - mlp(x)
        assert float(missing.mean(0).norm()) < 1e-5 < 0.01 < float((missing + mlp.down_proj.sparse_bias).mean(0).norm())
    ledger = sparsify.ledger_of(model)
    assert ledger.weighted_sparsity == pytest.approx(0.3, abs=1e-12)
    assert {linear.name for linear in ledger.linears if linear.compensated} == {
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    }
    again = sparsify.load(sparsify.save(model, tmp_path / "o"))
    with torch.inference_mode():
        assert torch.equal(again(tokens[:1]).logits, model(tokens[:1]).logits)
        with sparsify.dense(again):
            assert not torch.equal(again(tokens[:1]).logits, model(tokens[:1]).logits)


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.39])
def test_the_budget_is_of_all_linears_and_met_to_the_byte(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, sparsity: float
) -> None:
    dense = sum(m.weight.numel() * 4 for n, m in tiny_llama.named_modules() if n.endswith("_proj"))
    sparsify.convert(tiny_llama, Cats(sparsity=sparsity), tiny_calibration)
    ledger = sparsify.ledger_of(tiny_llama)
    assert ledger.dense_bytes == dense
    assert ledger.weighted_sparsity == pytest.approx(sparsity, abs=1e-12)
    for linear in ledger.linears:
        cut = linear.name.endswith(("up_proj", "down_proj"))
        assert (linear.touched_bytes < linear.dense_bytes) == cut
        assert cut or linear.density == 1.0


def test_realised_sparsity_counts_rows_and_columns(
    converted: PreTrainedModel, trained_calibration: Calibration
) -> None:
    with RealisedDensity(converted) as realised, torch.no_grad():
        converted(trained_calibration.tokens[:2], use_cache=False)
    found = realised.densities()
    density = converted.config.quantization_config.linears[f"{MLP}.up_proj"].density
    assert found[f"{MLP}.gate_proj"] == found["model.layers.0.self_attn.q_proj"] == 1.0
    # A kept neuron whose product with up is exactly 0 is the only difference.
    assert found[f"{MLP}.up_proj"] == pytest.approx(found[f"{MLP}.down_proj"], abs=1e-4)
    # The first MLP sees what it saw in calibration.
    assert found["model.layers.0.mlp.up_proj"] == pytest.approx(density, abs=0.03)


def test_it_comes_back_bit_equal(tiny_dense: Path, tmp_path: Path) -> None:
    model = sparsify.load_dense(str(tiny_dense))
    tokens = torch.arange(32).reshape(2, 16)
    with torch.inference_mode():
        dense = model(tokens).logits
    calibration = Calibration(torch.randint(model.config.vocab_size, (4, 32)), "random tokens")
    sparsify.convert(model, Cats(sparsity=0.35), calibration)
    assert native_forward_of(model) is None, "the native step knows no such cut"
    with torch.inference_mode():
        expected = model(tokens).logits
    assert not torch.equal(dense, expected)
    folder = sparsify.save(model, tmp_path / "cats")
    assert sparsify.verify(folder) == []
    for loaded in (sparsify.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        with torch.inference_mode():
            assert torch.equal(loaded(tokens).logits, expected)
            with sparsify.dense(loaded):
                assert torch.equal(loaded(tokens).logits, dense)
    again = sparsify.save(sparsify.load(folder), tmp_path / "again")
    assert sparsify.load(again).config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    with torch.inference_mode():
        assert torch.equal(sparsify.load(folder, dense=True)(tokens).logits, dense)


def test_dense_prefill_and_generation(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    tokens = tiny_calibration.tokens[:2, :12]
    with torch.no_grad():
        dense = tiny_llama(tokens).logits
    model: Any = sparsify.convert(tiny_llama, Cats(sparsity=0.35), tiny_calibration)
    copied = copy.deepcopy(model)
    set_prefill(copied, "dense")
    with torch.no_grad():
        sparse = model(tokens).logits
        assert not torch.allclose(sparse, dense, atol=1e-3)
        assert torch.equal(copied(tokens).logits, dense)
        prompt = model(tokens[:, :11], use_cache=True)
        step = model(tokens[:, 11:], past_key_values=prompt.past_key_values).logits
    torch.testing.assert_close(step[:, 0], sparse[:, 11], rtol=1e-4, atol=1e-4)
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 16)


def test_sparsity_0_is_the_dense_model(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with torch.no_grad():
        dense = tiny_llama(tiny_calibration.tokens[:1]).logits
        sparsify.convert(tiny_llama, Cats(sparsity=0.0), tiny_calibration)
        torch.testing.assert_close(tiny_llama(tiny_calibration.tokens[:1]).logits, dense, rtol=1e-4, atol=1e-4)
    assert tiny_llama.config.quantization_config.neurons is None
    assert sparsify.ledger_of(tiny_llama).weighted_sparsity == 0.0


def test_a_budget_beyond_up_and_down_names_the_largest(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    # Of 4 of 64·64 + 2·32·64 and three of 64·96 weights, up and down are half; 4 thresholds of 4 bytes come off.
    dense = 2 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    largest = math.floor((2 * 4 * 2 * 64 * 96 - 16) / dense * 1e4) / 1e4
    with pytest.raises(SparsifyError, match=f"sparsity 0.6 cannot be met by method cats: .* at most {largest} is"):
        sparsify.convert(tiny_llama, Cats(sparsity=0.6), tiny_calibration)
    assert not sparse_layers(tiny_llama)
    sparsify.convert(tiny_llama, Cats(sparsity=largest), tiny_calibration)
    assert sparsify.ledger_of(tiny_llama).weighted_sparsity == pytest.approx(largest)


@pytest.mark.parametrize("allocation", ["greedy", "sensitivity"])
def test_other_allocations_are_refused(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, allocation: str
) -> None:
    with pytest.raises(SparsifyError, match=f"allocation {allocation} .* method cats .* use allocation uniform"):
        sparsify.convert(tiny_llama, Cats(sparsity=0.3), tiny_calibration, allocation=allocation)
    assert not sparse_layers(tiny_llama)


@pytest.mark.parametrize("sparsity", [1.0, 50, float("nan"), "0.5"])
def test_bad_sparsity_is_refused(sparsity: object) -> None:
    with pytest.raises(SparsifyError, match="sparsity is"):
        Cats(sparsity=sparsity)  # type: ignore[arg-type]
