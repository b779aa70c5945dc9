"""auto: R-Sparse's candidates with every score, its own allocation unless another is asked for, a rotation first."""

import copy

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

import sparsify
from sparsify import Auto, Calibration, RSparse, SparsifyError
from sparsify.allocation import allocation_of
from sparsify.allocation.sensitivity import Sensitivity
from sparsify.budget import LinearShape


def test_it_offers_every_score_and_rank() -> None:
    shape = LinearShape(256, 512, 2)
    offered = Auto(sparsity=0.5).candidates("linear", shape)
    assert offered == RSparse(sparsity=0.5, rho="auto", score="auto", compensate=True).candidates("linear", shape)
    assert {candidate.score for candidate in offered} == {"magnitude", "column-norm", "residual-norm"}
    assert any(candidate.rank for candidate in offered)
    assert any(not candidate.rank for candidate in offered)


def test_it_allocates_by_sensitivity_unless_told_otherwise() -> None:
    assert allocation_of(None, Auto(sparsity=0.5)) == Sensitivity()
    assert allocation_of("uniform", Auto(sparsity=0.5)).name == "uniform"
    assert allocation_of(Sensitivity(steps=3), RSparse(sparsity=0.5)) == Sensitivity(steps=3)
    assert allocation_of(None, RSparse(sparsity=0.5)).name == "uniform"


def test_a_conversion_says_what_it_was(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    dense = copy.deepcopy(tiny_llama)
    sparsify.convert(tiny_llama, Auto(sparsity=0.5), tiny_calibration)
    config = tiny_llama.config.quantization_config
    assert (config.method, config.allocation, config.sparsity, config.rotated) == ("auto", "sensitivity", 0.5, True)
    ledger = sparsify.ledger_of(tiny_llama)
    assert ledger.touched_bytes == pytest.approx(0.5 * ledger.dense_bytes, abs=0.01)
    # Linears differ in what they are given: a tiny random model already has sensitive and insensitive ones.
    assert len({round(entry.sparsity, 6) for entry in config.linears.values()}) > 1
    ids = tiny_calibration.tokens[:1]
    with torch.no_grad(), sparsify.dense(tiny_llama):
        torch.testing.assert_close(tiny_llama(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


def test_at_sparsity_0_it_is_the_model_that_went_in(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    dense = copy.deepcopy(tiny_llama)
    sparsify.convert(tiny_llama, Auto(sparsity=0.0), tiny_calibration)
    assert not tiny_llama.config.quantization_config.rotated
    with torch.no_grad():
        assert torch.equal(tiny_llama(tiny_calibration.tokens).logits, dense(tiny_calibration.tokens).logits)


def test_a_model_that_cannot_be_rotated_is_converted_as_it_is(tiny_calibration: Calibration) -> None:
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    weights = copy.deepcopy(model.state_dict())
    sparsify.convert(model, Auto(sparsity=0.4), tiny_calibration)
    assert not model.config.quantization_config.rotated
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_bad_sparsities_are_refused() -> None:
    with pytest.raises(SparsifyError, match=r"1\.0"):
        Auto(sparsity=1.0)
