"""Sensitivity: better than uniform where linears differ by construction, and the gradients that it follows."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, RSparse, SparsifyError, Teal, Wina
from sparsify.allocation.sensitivity import Sensitivity
from sparsify.channel_conversion import prepare
from sparsify.methods import Method
from sparsify.targets import find_targets, linear_shapes
from sparsify.trial import Trial, dense_log_probabilities, input_gradients, kl_divergence


def kl_of(model: PreTrainedModel, method: Method, calibration: Calibration, allocation: str | Sensitivity) -> float:
    """Returns the KL to the dense model of a copy converted with the allocation, on tokens of its own."""
    tokens = torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(9))
    dense = dense_log_probabilities(model, tokens)
    other = sparsify.convert(copy.deepcopy(model), method, calibration, allocation=allocation)
    with torch.no_grad():
        return float(kl_divergence(other, tokens, dense)) / tokens.numel()


@pytest.mark.parametrize("method", [Teal(sparsity=0.5), Wina(sparsity=0.5)], ids=lambda method: method.name)
def test_it_beats_uniform_where_a_block_does_not_matter(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, method: Method
) -> None:
    block = tiny_llama.model.layers[0]
    with torch.no_grad():
        block.self_attn.o_proj.weight.mul_(0.01)
        block.mlp.down_proj.weight.mul_(0.01)
    uniform = kl_of(tiny_llama, method, tiny_calibration, "uniform")
    ours = kl_of(tiny_llama, method, tiny_calibration, Sensitivity(steps=24, batch=2))
    assert ours < 0.6 * uniform
    sparsify.convert(tiny_llama, method, tiny_calibration, allocation=Sensitivity(steps=24, batch=2))
    shares = {name: 1 - entry.sparsity for name, entry in tiny_llama.config.quantization_config.linears.items()}
    silent = [share for name, share in shares.items() if name.startswith("model.layers.0.")]
    heard = [share for name, share in shares.items() if name.startswith("model.layers.1.")]
    assert max(silent) < min(heard)


def test_it_chooses_the_rank_where_a_weight_has_one(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    low, full = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
    weight = tiny_llama.get_submodule(low).weight
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(weight)
        s[4:] *= 0.01
        weight.copy_((u[:, : len(s)] * s) @ vh)
    method = RSparse(sparsity=0.5, score="auto")
    sparsify.convert(tiny_llama, method, tiny_calibration, allocation=Sensitivity(steps=4, batch=2))
    entries = tiny_llama.config.quantization_config.linears
    assert entries[low].rank >= 4
    assert entries[full].rank < entries[low].rank


def test_without_steps_shares_are_uniform(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation=Sensitivity(steps=0))
    assert {entry.sparsity for entry in tiny_llama.config.quantization_config.linears.values()} == {0.5}


def test_progress_is_told(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    seen: list[tuple[str, int, int]] = []
    sparsify.convert(
        tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation=Sensitivity(steps=2, batch=1),
        progress=lambda *stage: seen.append(stage),
    )  # fmt: skip
    assert [entry for entry in seen if entry[0] == "allocate"] == [("allocate", done, 4) for done in (1, 2, 3, 4)]


def test_logits_that_are_not_finite_are_refused(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight[5, 5] = float("inf")
    with pytest.raises(SparsifyError, match="logits of the sparse model are not finite"):
        sparsify.convert(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation="sensitivity")
    assert "forward" not in vars(tiny_llama.model.layers[0].mlp.up_proj)
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def trial_of(model: PreTrainedModel, method: Method, tokens: torch.Tensor) -> Trial:
    targets = find_targets(model, tokens[:1, :8])
    shapes = linear_shapes(model, targets)
    trial = Trial(model, prepare(model, targets, shapes))
    trial.place({name: method.candidates(name, shape)[0] for name, shape in shapes.items()})
    with trial.calibrating(), torch.no_grad():
        model(tokens)
    return trial


@pytest.mark.parametrize("score", ["magnitude", "column-norm", "residual-norm"])
def test_a_trial_runs_what_the_conversion_makes(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, score: str
) -> None:
    method, tokens = RSparse(sparsity=0.5, rho=0.7, score=score), tiny_calibration.tokens
    trial = trial_of(tiny_llama, method, tokens)
    with trial.running(), torch.no_grad():
        tried = tiny_llama(tokens).logits
    sparsify.convert(tiny_llama, method, tiny_calibration)
    with torch.no_grad():
        torch.testing.assert_close(tiny_llama(tokens).logits, tried, rtol=1e-4, atol=1e-4)


def test_gradients_run_straight_through_the_cut(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    tokens = tiny_calibration.tokens
    trial = trial_of(tiny_llama, Teal(sparsity=0.8), tokens)
    up = tiny_llama.model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, requires_grad=True)
    with trial.running():
        y = up(x)
    keep = x.detach().abs() > trial.placed["model.layers.0.mlp.up_proj"].threshold
    assert not keep.all()
    torch.testing.assert_close(y, torch.nn.functional.linear(x * keep, up.weight))
    y.sum().backward()
    # Not (Wᵀ1) ⊙ keep: an input that moves crosses the threshold, too.
    torch.testing.assert_close(x.grad, up.weight.sum(0).expand(5, 64))


def test_the_value_of_a_byte_is_the_slope_of_the_loss(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    """The summed first-order gains of switching channels on predict what a lower threshold does to the KL."""
    tokens = tiny_calibration.tokens
    trial = trial_of(tiny_llama, Teal(sparsity=0.5), tokens)
    dense = dense_log_probabilities(tiny_llama, tokens)
    gains = {}

    def observe(linear: str, call):  # type: ignore[no-untyped-def]
        low, high = trial.placed[linear].band()
        near = (call.score > low) & (call.score <= high)

        def see(gradient: torch.Tensor) -> None:
            products = -trial.linears[linear].through_residual(gradient, 0) * call.x
            gains[linear] = float(products[near].sum())

        return see

    trial.observer = observe
    with trial.running(), input_gradients(tiny_llama):
        kl_divergence(tiny_llama, tokens, dense).backward()
    trial.observer = None
    moved = []
    for index in range(2):
        for placed in trial.placed.values():
            placed.threshold = placed.band()[index]
        with trial.running(), torch.no_grad():
            moved.append(float(kl_divergence(tiny_llama, tokens, dense)))
    # First order, on both sides of a cut that moves by a tenth of all channels.
    assert sum(gains.values()) == pytest.approx(moved[1] - moved[0], rel=0.3)
