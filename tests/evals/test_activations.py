"""What is collected for a report, against the other ways to count the same."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparsify
from sparsify.calibration import Calibration
from sparsify.errors import SparsifyError
from sparsify.evals.activations import BINS, HIGH, LOW, collect_activations
from sparsify.evals.realised import RealisedDensity
from sparsify.ledger import ledger_of
from sparsify.runtime import sparse_layers, switch_of
from sparsify.text import Windows

_WINDOWS = Windows(
    tokens=torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(1)),
    scored_from=torch.ones(3, dtype=torch.int64),
    token_bytes=torch.ones(3, 16, dtype=torch.int64),
    stride=15, bos=False, byte_count="exact", name="random", sha256="0" * 64,
)  # fmt: skip


def _model(method: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if method is not None:
        sparsify.convert(model, method, Calibration(torch.randint(0, 64, (4, 32)), "random"))
    return model


@pytest.mark.parametrize(
    "method", [sparsify.RSparse(0.5), sparsify.TopK(0.5), sparsify.Cats(0.3)], ids=lambda m: m.name
)
def test_counts_are_those_of_realised_density(method: Any) -> None:
    model = _model(method)
    found = collect_activations(model, _WINDOWS)
    with RealisedDensity(model) as realised, torch.inference_mode():
        for window in _WINDOWS.tokens:
            model(window[None], use_cache=False)
    densities = {name: linear["density"] for name, linear in found["activations"].items()}
    assert densities == pytest.approx(realised.densities())
    # The ledger is linear in the densities, so the mean over positions is that of all tokens.
    by_position = found["sparsity_by_position"]
    assert len(by_position) == 16
    whole = ledger_of(model).with_densities(realised.densities()).weighted_sparsity
    assert sum(by_position) / 16 == pytest.approx(whole)
    assert max(by_position) >= min(by_position)


def test_histograms_are_relative_to_the_threshold() -> None:
    model = _model(sparsify.Teal(0.5))
    found = collect_activations(model, _WINDOWS)["activations"]
    assert set(found) == set(sparse_layers(model))
    zero = round(-LOW / (HIGH - LOW) * BINS)
    for linear in found.values():
        assert sum(linear["histogram"]) + linear["zeros"] == pytest.approx(1.0)
        # The threshold is an edge between bins: what is above is what is kept.
        assert sum(linear["histogram"][zero:]) == pytest.approx(linear["density"], abs=1e-3)


def test_a_cut_by_rank_has_no_histogram() -> None:
    found = collect_activations(_model(sparsify.TopK(0.5)), _WINDOWS)["activations"]
    assert all(linear["histogram"] is None for linear in found.values())


def test_singular_values_are_those_of_the_middle_layer() -> None:
    model = _model(sparsify.RSparse(0.5, rho=0.8))
    found = collect_activations(model, _WINDOWS)["singular_values"]
    assert len(found) == 7
    for name, spectrum in found.items():
        assert ".layers.1." in name
        layer = sparse_layers(model)[name]
        exact = torch.linalg.svdvals(layer.weight.detach().double())
        expected = [float(exact[rank - 1] / exact[0]) for rank in spectrum["at"]]
        assert spectrum["values"] == pytest.approx(expected, abs=1e-5)
        assert spectrum["at"][0] == 1
        assert spectrum["at"][-1] == len(exact)
        assert spectrum["rank"] == layer.rank > 0


@pytest.mark.parametrize(
    ("method", "said"), [(None, "convert"), (sparsify.Griffin(0.3), "prompts choose")], ids=["dense", "griffin"]
)
def test_without_sparse_tokens_there_is_nothing_to_collect(method: Any, said: str) -> None:
    with pytest.raises(SparsifyError, match=said):
        collect_activations(_model(method), _WINDOWS)


def test_every_token_runs_sparse_whatever_the_prefill() -> None:
    model = _model(sparsify.Teal(0.5))
    expected = collect_activations(model, _WINDOWS)
    sparsify.set_prefill(model, "dense")
    assert collect_activations(model, _WINDOWS) == expected
    assert switch_of(model).prefill == "dense"
