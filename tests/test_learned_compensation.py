"""The compensation that auto learns: lower KL on windows it has not seen, or no compensation at all."""

import copy
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparsify
from sparsify import Auto, Calibration, compensation
from sparsify.budget import LinearShape, split_budget, uncompensated
from sparsify.compensation import Learned, learn_compensation
from sparsify.runtime import sparse_layers
from sparsify.targets import dense_weight
from sparsify.trial import TargetLinear, Trial, dense_log_probabilities, kl_divergence


@pytest.fixture(scope="module")
def biased() -> PreTrainedModel:
    """A tiny random Llama whose MLPs have positive biases: what is dropped before `down` has a mean to give back."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, mlp_bias=True,
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data *= 5
        elif name.endswith(("gate_proj.bias", "up_proj.bias")):
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1)), "random tokens")


def _trial(model: PreTrainedModel, tokens: torch.Tensor, *, compensated: bool = True) -> Trial:
    """Returns a trial of TEAL's candidates at 50% with thresholds from the tokens."""
    linears = {
        name: TargetLinear(module, index, dense_weight(module).norm(dim=0))
        for index, (name, module) in enumerate(model.named_modules())
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    trial = Trial(model, linears)
    trial.place(
        {
            name: split_budget(
                name, LinearShape(*linear.weight.shape, 4), sparsity=0.5, rho=1.0, score="magnitude",
                compensated=compensated,
            )
            for name, linear in linears.items()
        }
    )  # fmt: skip
    with trial.calibrating(), torch.no_grad():
        model(input_ids=tokens)
    return trial


def _kl(trial: Trial, tokens: torch.Tensor) -> float:
    dense = dense_log_probabilities(trial.model, tokens)
    with trial.running(), torch.no_grad():
        return float(kl_divergence(trial.model, tokens, dense)) / tokens.numel()


def test_it_lowers_the_divergence_on_held_out_windows(biased: PreTrainedModel, calibration: Calibration) -> None:
    trial = _trial(biased, calibration.tokens)
    weights = {name: parameter.clone() for name, parameter in biased.state_dict().items()}
    held_out = calibration.tokens[-1:]
    before = _kl(trial, held_out)
    learned = learn_compensation(trial, calibration)
    assert learned.before == pytest.approx(before, rel=1e-5)
    assert learned.after < 0.9 * learned.before
    assert {name: c.shape for name, c in learned.compensation.items()} == {
        name: (linear.weight.shape[0],) for name, linear in trial.linears.items()
    }
    # The trial is as it was, and with what was found it has the divergence that was reported.
    assert _kl(trial, held_out) == before
    for name, c in learned.compensation.items():
        trial.placed[name].compensation = c
    assert _kl(trial, held_out) == pytest.approx(learned.after, rel=1e-5)
    assert all(torch.equal(weights[name], value) for name, value in biased.state_dict().items())
    again = learn_compensation(_trial(biased, calibration.tokens), calibration)
    assert all(torch.equal(again.compensation[name], c) for name, c in learned.compensation.items())


def test_it_is_not_learned_where_nothing_can_be_held_out_or_nothing_is_asked(
    biased: PreTrainedModel, calibration: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    one = Calibration(calibration.tokens[:1], "one window")
    assert not learn_compensation(_trial(biased, one.tokens), one).compensation
    assert "none would be held out" in caplog.text
    caplog.clear()
    assert not learn_compensation(_trial(biased, calibration.tokens, compensated=False), calibration).compensation
    assert not caplog.text


def test_a_conversion_keeps_what_was_learned(
    biased: PreTrainedModel, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn(trial: Trial, *args: Any) -> Learned:
        placed = {name: entry for name, entry in trial.placed.items() if entry.candidate.compensated}
        return Learned({name: torch.full((len(trial.linears[name].weight),), 0.25) for name in placed}, 0.2, 0.1)

    monkeypatch.setattr(compensation, "learn_compensation", learn)
    model = copy.deepcopy(biased)
    sparsify.convert(model, Auto(sparsity=0.5), calibration)
    layers, entries = sparse_layers(model), model.config.quantization_config.linears
    # A linear that is given all of its bytes is dense, and drops nothing.
    assert any(layer.sparse_bias is not None for layer in layers.values())
    for name, layer in layers.items():
        assert (layer.sparse_bias is not None) == (entries[name].density < 1.0) == bool(entries[name].compensated)
        if layer.sparse_bias is not None:
            # A linear without a bias of its own starts from nothing.
            own = torch.zeros(()) if layer.bias is None else layer.bias
            torch.testing.assert_close(layer.sparse_bias, (own + 0.25).expand_as(layer.sparse_bias))
    ledger = sparsify.ledger_of(model)
    assert ledger.touched_bytes == pytest.approx(0.5 * ledger.dense_bytes, abs=0.01)


def test_without_a_gain_its_bytes_are_channels(
    biased: PreTrainedModel, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensation, "learn_compensation", lambda *args: Learned({}, 0.1, 0.1))
    model = copy.deepcopy(biased)
    sparsify.convert(model, Auto(sparsity=0.5), calibration)
    assert all(layer.sparse_bias is None for layer in sparse_layers(model).values())
    assert all(entry.compensated is None for entry in model.config.quantization_config.linears.values())
    ledger = sparsify.ledger_of(model)
    assert ledger.touched_bytes == pytest.approx(0.5 * ledger.dense_bytes, abs=0.01)


def test_it_stops_early_without_a_gain(
    biased: PreTrainedModel, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensation, "_RATE", 1e4)
    seen: list[Any] = []
    learned = learn_compensation(_trial(biased, calibration.tokens), calibration, lambda *args: seen.append(args))
    assert not learned.compensation
    assert learned.after == learned.before
    assert math.isfinite(learned.before)
    stage, last, total = seen[-1]
    assert (stage, last) == ("compensate", total)
    assert len(seen) == total / 2


@pytest.mark.parametrize("compensated", [True, False])
def test_a_candidate_without_compensation_costs_the_same(compensated: bool) -> None:
    shape = LinearShape(48, 32, 2)
    candidate = split_budget("q", shape, sparsity=0.4, rho=0.9, score="column-norm", compensated=compensated)
    plain = uncompensated(candidate, shape)
    assert not plain.compensated
    cost = [
        c.density * shape.dense_bytes + shape.low_rank_bytes(c.rank)
        + shape.overhead_bytes(scaled=c.scaled, compensated=c.compensated)
        for c in (candidate, plain)
    ]  # fmt: skip
    assert cost[0] == pytest.approx(cost[1], abs=1e-9)
    assert (plain == candidate) == (not compensated)
