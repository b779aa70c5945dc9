"""TEAL against its paper's equation: keep |x_j| > t, one threshold for all linears of an input site."""

import copy

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, SparsifyError, Teal
from sparsify.runtime import sparse_layers


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_output_is_the_papers_on_real_activations(
    trained: PreTrainedModel, trained_calibration: Calibration, trained_inputs: dict[str, torch.Tensor], sparsity: float
) -> None:
    model = sparsify.convert(copy.deepcopy(trained), Teal(sparsity=sparsity), trained_calibration)
    for name, x in trained_inputs.items():
        layer = sparse_layers(model)[name]
        threshold = float(layer.threshold)
        entry = model.config.quantization_config.linears[name]
        # The threshold's own four bytes come off the budget.
        assert entry.density == pytest.approx(1 - sparsity, abs=0.001)
        assert threshold == pytest.approx(float(np.quantile(x.abs(), 1 - entry.density)), rel=0.005)
        assert float((x.abs() > threshold).float().mean()) == pytest.approx(1 - sparsity, abs=0.01)
        weight, expected = layer.weight.detach().double(), torch.zeros(4, layer.out_features, dtype=torch.float64)
        for n, row in enumerate(x[:4].tolist()):
            for j, value in enumerate(row):
                if abs(value) > threshold:
                    expected[n] += weight[:, j] * value
        # fp32 sums of up to some hundred products.
        torch.testing.assert_close(layer(x[:4]).detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_a_site_has_one_threshold_and_no_other_tensor(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    sparsify.convert(tiny_llama, Teal(sparsity=0.5), tiny_calibration)
    layers = sparse_layers(tiny_llama)
    for layer in layers.values():
        assert layer.scale is None
        assert layer.lr_a is None
        assert layer.lr_b is None
    for block in ("model.layers.0", "model.layers.1"):
        # k and v are half as large, so the threshold's four bytes buy them a slightly smaller density.
        q, k, v = (layers[f"{block}.self_attn.{p}_proj"].threshold for p in "qkv")
        assert torch.equal(k, v)
        assert float(q) == pytest.approx(float(k), rel=0.01)


def test_sparsity_0_99_keeps_what_its_bytes_pay_for(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, Teal(sparsity=0.99), tiny_calibration)
    ledger = sparsify.ledger_of(tiny_llama)
    assert ledger.weighted_sparsity == pytest.approx(0.99)
    assert all(0.0 < linear.density < 0.01 for linear in ledger.linears)
    with torch.no_grad():
        assert tiny_llama(tiny_calibration.tokens[:1]).logits.isfinite().all()


@pytest.mark.parametrize("sparsity", [1.0, -0.5, 50, float("nan"), "0.5", None])
def test_bad_sparsity_is_refused(sparsity: object) -> None:
    with pytest.raises(SparsifyError, match="sparsity is"):
        Teal(sparsity=sparsity)  # type: ignore[arg-type]
