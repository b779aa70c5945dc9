"""Top-k against its paper's definition, written out in plain loops on the reference model's activations."""

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, SparsifyError, TopK
from sparsify.linear import SparseLinear
from sparsify.runtime import sparse_layers
from sparsify.token_layer import TopKLinear


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"])
def test_output_is_the_papers_on_real_activations(
    trained: PreTrainedModel, trained_calibration: Calibration, trained_inputs: dict[str, Tensor], name: str
) -> None:
    model = sparsify.convert(copy.deepcopy(trained), TopK(sparsity=0.6), trained_calibration)
    layer, x = sparse_layers(model)[name], trained_inputs[name][:8]
    k = math.floor(layer.sparse_in * model.config.quantization_config.linears[name].density + 1e-9)
    assert float(layer.threshold) == k
    weight, expected = layer.weight.detach().double(), torch.zeros(len(x), layer.sparse_out, dtype=torch.float64)
    for n, row in enumerate(x.tolist()):
        largest = sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))[:k]
        for j in largest:
            expected[n] += weight[:, j] * row[j]
    # fp32 sums of up to some hundred products.
    torch.testing.assert_close(layer(x).detach().double(), expected, rtol=1e-4, atol=1e-4)
    assert (layer.keep(trained_inputs[name]).sum(-1) == k).all()


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_k_is_what_the_bytes_pay_for(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, sparsity: float
) -> None:
    sparsify.convert(tiny_llama, TopK(sparsity=sparsity), tiny_calibration)
    for linear in sparsify.ledger_of(tiny_llama).linears:
        budget = (1 - sparsity) * linear.dense_bytes
        assert budget - linear.dense_bytes / linear.inputs < linear.touched_bytes <= budget
        assert (linear.density * linear.inputs).is_integer()


def test_sparsity_0_is_the_dense_model(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with torch.no_grad():
        dense = tiny_llama(tiny_calibration.tokens[:1]).logits
        sparsify.convert(tiny_llama, TopK(sparsity=0.0), tiny_calibration)
        torch.testing.assert_close(tiny_llama(tiny_calibration.tokens[:1]).logits, dense, rtol=1e-4, atol=1e-4)
    assert all(type(layer) is SparseLinear for layer in sparse_layers(tiny_llama).values())


def test_less_than_one_channel_is_refused(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with pytest.raises(SparsifyError, match=r"sparsity 0\.99 pays for less than one of the 64 channels of .*q_proj"):
        sparsify.convert(tiny_llama, TopK(sparsity=0.99), tiny_calibration)
    assert not sparse_layers(tiny_llama)


def test_layers_are_named_by_their_cut(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, TopK(sparsity=0.5), tiny_calibration)
    assert all(type(layer) is TopKLinear for layer in sparse_layers(tiny_llama).values())


@pytest.mark.parametrize("sparsity", [1.0, 50, float("nan"), "0.5"])
def test_bad_sparsity_is_refused(sparsity: object) -> None:
    with pytest.raises(SparsifyError, match="sparsity is"):
        TopK(sparsity=sparsity)  # type: ignore[arg-type]
