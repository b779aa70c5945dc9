"""WINA against its paper's equation: keep |x_j|·‖W[:,j]‖₂ > t, a threshold and a score for each linear."""

import pytest
import torch
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, Wina
from sparsify.runtime import sparse_layers


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_output_is_the_papers_equation(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, sparsity: float
) -> None:
    modules = dict(tiny_llama.named_modules())
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qv"]
    seen: list[torch.Tensor] = []
    handle = modules[names[0]].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for window in tiny_calibration.tokens:
            tiny_llama(window[None])
    handle.remove()
    x = torch.cat(seen)
    sparsify.convert(tiny_llama, Wina(sparsity=sparsity), tiny_calibration)
    for name in names:
        layer = sparse_layers(tiny_llama)[name]
        weight = layer.weight.detach().double()
        norms = [float(weight[:, j].square().sum().sqrt()) for j in range(layer.in_features)]
        torch.testing.assert_close(layer.scale.double(), torch.tensor(norms, dtype=torch.float64), rtol=1e-6, atol=0)
        entry = tiny_llama.config.quantization_config.linears[name]
        scores = (x.double() * torch.tensor(norms)).abs()
        assert float((scores > float(layer.threshold)).double().mean()) == pytest.approx(entry.density, abs=0.005)
        expected = torch.zeros(4, layer.out_features, dtype=torch.float64)
        for n, row in enumerate(x[:4].tolist()):
            for j, value in enumerate(row):
                if abs(value) * norms[j] > float(layer.threshold):
                    expected[n] += weight[:, j] * value
        torch.testing.assert_close(layer(x[:4]).detach().double(), expected, rtol=1e-4, atol=1e-5)
    # Scores are per linear: q and v of one input keep different channels.
    q, v = (sparse_layers(tiny_llama)[name].threshold for name in names)
    assert not torch.equal(q, v)


def test_scales_are_paid_from_the_budget(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, Wina(sparsity=0.5), tiny_calibration)
    ledger = sparsify.ledger_of(tiny_llama)
    assert ledger.weighted_sparsity == pytest.approx(0.5)
    for linear in ledger.linears:
        # fp32 scales on fp32 weights of O rows: one row of O.
        assert linear.density == pytest.approx(0.5 - 1 / linear.outputs, abs=0.002)
