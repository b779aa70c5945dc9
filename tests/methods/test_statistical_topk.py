"""Statistical top-k against its paper's equation in plain loops, and against Gemma 3n's released code."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

import sparsify
from sparsify import Calibration, SparsifyError, StatisticalTopK
from sparsify.runtime import sparse_layers

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"]


@pytest.fixture(scope="module")
def converted(trained: PreTrainedModel, trained_calibration: Calibration) -> PreTrainedModel:
    """The reference model at 60%; to be read only."""
    return sparsify.convert(copy.deepcopy(trained), StatisticalTopK(sparsity=0.6), trained_calibration)


@pytest.mark.parametrize("name", NAMES)
def test_output_is_the_papers_equation_on_real_activations(
    converted: PreTrainedModel, trained_inputs: dict[str, Tensor], name: str
) -> None:
    layer, x = sparse_layers(converted)[name], trained_inputs[name][:8]
    z, inputs = float(layer.threshold), layer.sparse_in
    weight, expected = layer.weight.detach().double(), torch.zeros(len(x), layer.sparse_out, dtype=torch.float64)
    for n, row in enumerate(x.tolist()):
        mean = sum(abs(value) for value in row) / inputs
        std = math.sqrt(sum((abs(value) - mean) ** 2 for value in row) / inputs)
        for j, value in enumerate(row):
            if abs(value) > mean + z * std:
                expected[n] += weight[:, j] * value
    torch.testing.assert_close(layer(x).detach().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_channels_as_gemma_3n(
    converted: PreTrainedModel, trained_inputs: dict[str, Tensor], name: str
) -> None:
    layer, x = sparse_layers(converted)[name], trained_inputs[name]
    # Its code turns a sparsity into z by the normal quantile: undone here by the normal distribution function.
    share = 0.5 * (1.0 + math.erf(float(layer.threshold) / math.sqrt(2.0)))
    theirs: Any = Gemma3nTextMLP._gaussian_topk(SimpleNamespace(activation_sparsity=share), x.abs())  # type: ignore[arg-type]
    # The quantile is computed in fp32: a score in ten thousand may fall on the other side.
    assert float(((theirs > 0) != layer.keep(x)).float().mean()) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_z_keeps_the_density_on_calibration_text(
    converted: PreTrainedModel, trained_inputs: dict[str, Tensor], name: str
) -> None:
    density = converted.config.quantization_config.linears[name].density
    kept = sparse_layers(converted)[name].keep(trained_inputs[name]).float().mean(-1)
    assert float(kept.mean()) == pytest.approx(density, abs=0.003)
    # The number of channels is the token's own.
    assert float(kept.std()) > 0.0


def test_the_budget_is_met_to_the_byte(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, StatisticalTopK(sparsity=0.5), tiny_calibration)
    assert sparsify.ledger_of(tiny_llama).weighted_sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("sparsity", [1.0, 50, float("nan"), "0.5"])
def test_bad_sparsity_is_refused(sparsity: object) -> None:
    with pytest.raises(SparsifyError, match="sparsity is"):
        StatisticalTopK(sparsity=sparsity)  # type: ignore[arg-type]
