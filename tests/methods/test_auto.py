"""auto: R-Sparse's candidates with every score, and an allocation of its own unless another is asked for."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

import sparsify
from sparsify import Auto, Calibration, RSparse, SparsifyError
from sparsify.allocation import allocation_of
from sparsify.allocation.sensitivity import Sensitivity
from sparsify.budget import LinearShape


def test_it_offers_every_score_and_rank() -> None:
    shape = LinearShape(256, 512, 2)
    offered = Auto(sparsity=0.5).candidates("linear", shape)
    assert offered == RSparse(sparsity=0.5, rho="auto", score="auto").candidates("linear", shape)
    assert {candidate.score for candidate in offered} == {"magnitude", "column-norm", "residual-norm"}
    assert any(candidate.rank for candidate in offered)
    assert any(not candidate.rank for candidate in offered)


def test_it_allocates_by_sensitivity_unless_told_otherwise() -> None:
    assert allocation_of(None, Auto(sparsity=0.5)) == Sensitivity()
    assert allocation_of("uniform", Auto(sparsity=0.5)).name == "uniform"
    assert allocation_of(Sensitivity(steps=3), RSparse(sparsity=0.5)) == Sensitivity(steps=3)
    assert allocation_of(None, RSparse(sparsity=0.5)).name == "uniform"


def test_a_conversion_says_what_it_was(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    other = copy.deepcopy(tiny_llama)
    sparsify.convert(tiny_llama, Auto(sparsity=0.5), tiny_calibration)
    config = tiny_llama.config.quantization_config
    assert (config.method, config.allocation, config.sparsity) == ("auto", "sensitivity", 0.5)
    ledger = sparsify.ledger_of(tiny_llama)
    assert ledger.touched_bytes == pytest.approx(0.5 * ledger.dense_bytes, abs=0.01)
    # Linears differ in what they are given: a tiny random model already has sensitive and insensitive ones.
    assert len({round(entry.sparsity, 6) for entry in config.linears.values()}) > 1
    sparsify.convert(other, RSparse(sparsity=0.5, score="auto"), tiny_calibration, allocation="sensitivity")
    ids = tiny_calibration.tokens[:1]
    with torch.no_grad():
        assert torch.equal(tiny_llama(ids).logits, other(ids).logits)


def test_bad_sparsities_are_refused() -> None:
    with pytest.raises(SparsifyError, match=r"1\.0"):
        Auto(sparsity=1.0)
