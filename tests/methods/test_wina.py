"""WINA against its paper's equation: keep |x_j|·‖W[:,j]‖₂ > t, a threshold and a score for each linear."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, Wina
from sparsify.runtime import sparse_layers


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_output_is_the_papers_on_real_activations(
    trained: PreTrainedModel, trained_calibration: Calibration, trained_inputs: dict[str, torch.Tensor], sparsity: float
) -> None:
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qv"]
    # q and v have one input.
    x = trained_inputs[names[0]]
    model = sparsify.convert(copy.deepcopy(trained), Wina(sparsity=sparsity), trained_calibration)
    for name in names:
        layer = sparse_layers(model)[name]
        weight = layer.weight.detach().double()
        norms = [float(weight[:, j].square().sum().sqrt()) for j in range(layer.in_features)]
        torch.testing.assert_close(layer.scale.double(), torch.tensor(norms, dtype=torch.float64), rtol=1e-6, atol=0)
        entry = model.config.quantization_config.linears[name]
        scores = (x.double() * torch.tensor(norms)).abs()
        assert float((scores > float(layer.threshold)).double().mean()) == pytest.approx(entry.density, abs=0.005)
        expected = torch.zeros(4, layer.out_features, dtype=torch.float64)
        for n, row in enumerate(x[:4].tolist()):
            for j, value in enumerate(row):
                if abs(value) * norms[j] > float(layer.threshold):
                    expected[n] += weight[:, j] * value
        # fp32 sums of some hundred products.
        torch.testing.assert_close(layer(x[:4]).detach().double(), expected, rtol=1e-4, atol=1e-4)
    # Scores are per linear: q and v of one input keep different channels.
    q, v = (sparse_layers(model)[name].threshold for name in names)
    assert not torch.equal(q, v)


def test_scales_are_paid_from_the_budget(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, Wina(sparsity=0.5), tiny_calibration)
    ledger = sparsify.ledger_of(tiny_llama)
    assert ledger.weighted_sparsity == pytest.approx(0.5)
    for linear in ledger.linears:
        # fp32 scales on fp32 weights of O rows: one row of O.
        assert linear.density == pytest.approx(0.5 - 1 / linear.outputs, abs=0.002)
