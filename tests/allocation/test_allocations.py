"""What holds for every allocation: the budget to the byte, the same twice, a model left as it was, clear refusals."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import sparsify
from sparsify import Calibration, RSparse, SparsifyError, Teal, Wina
from sparsify.allocation import Allocation, available, get_allocation
from sparsify.allocation.evolutionary import Evolutionary
from sparsify.allocation.greedy import Greedy
from sparsify.allocation.larosa import LarosaSplit
from sparsify.allocation.sensitivity import Sensitivity
from sparsify.allocation.uniform import Uniform
from sparsify.budget import LinearShape, fill_budget
from sparsify.methods import Method
from sparsify.runtime import sparse_layers

ALLOCATIONS = [
    Uniform(), Greedy(step=0.1, windows=1), Sensitivity(steps=3, batch=2), LarosaSplit(), Evolutionary(4, 1, windows=1)
]  # fmt: skip
METHODS = [Teal(sparsity=0.5), Wina(sparsity=0.6), RSparse(sparsity=0.4, score="auto")]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda allocation: allocation.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_budget_is_met_to_the_byte(
    tiny_llama: PreTrainedModel,
    tiny_calibration: Calibration,
    method: Method,
    allocation: Allocation,
    dtype: torch.dtype,
) -> None:
    model = sparsify.convert(tiny_llama.to(dtype), method, tiny_calibration, allocation=allocation)
    ledger = sparsify.ledger_of(model)
    # A hundredth of a byte: what fp64 leaves.
    assert ledger.touched_bytes == pytest.approx((1 - method.sparsity) * ledger.dense_bytes, abs=0.01)
    with torch.no_grad():
        assert model(tiny_calibration.tokens[:1]).logits.isfinite().all()


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda allocation: allocation.name)
def test_the_same_twice_and_the_weights_as_they_were(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, allocation: Allocation
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    other = copy.deepcopy(tiny_llama).train()
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5), tiny_calibration, allocation=allocation)
    torch.manual_seed(7)
    sparsify.convert(other, RSparse(sparsity=0.5), tiny_calibration, allocation=allocation)
    after, again = tiny_llama.state_dict(), other.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after.keys() == again.keys()
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert other.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in other.parameters())
    for layer in sparse_layers(other).values():
        assert "forward" not in vars(layer)
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


def test_uniform_is_the_default_and_what_it_was(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    other = copy.deepcopy(tiny_llama)
    sparsify.convert(tiny_llama, Wina(sparsity=0.5), tiny_calibration)
    sparsify.convert(other, Wina(sparsity=0.5), tiny_calibration, allocation="uniform")
    config = tiny_llama.config.quantization_config
    assert config.to_dict() == other.config.quantization_config.to_dict()
    assert "allocation" not in config.to_dict()
    assert {entry.sparsity for entry in config.linears.values()} == {0.5}


def test_a_checkpoint_tells_its_allocation(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation=Greedy(step=0.25, windows=1))
    config = tiny_llama.config.quantization_config
    assert config.to_dict()["allocation"] == "greedy"
    assert type(config).from_dict(config.to_dict()).allocation == "greedy"


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=lambda allocation: allocation.name)
def test_sparsity_0_is_the_dense_model(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, allocation: Allocation
) -> None:
    tokens = tiny_calibration.tokens[:1]
    with torch.no_grad():
        dense = tiny_llama(tokens).logits
        sparsify.convert(tiny_llama, Teal(sparsity=0.0), tiny_calibration, allocation=allocation)
        torch.testing.assert_close(tiny_llama(tokens).logits, dense)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    wishes=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8),
    rows=st.lists(st.integers(1, 500), min_size=8, max_size=8),
    sparsity=st.floats(0.01, 0.9),
)
def test_a_filled_budget_keeps_its_bounds_and_its_sum(wishes: list[float], rows: list[int], sparsity: float) -> None:
    named = {str(index): wish for index, wish in enumerate(wishes)}
    shapes = {name: LinearShape(rows[int(name)], 64, 4) for name in named}
    least = dict.fromkeys(named, 0.05)
    shares = fill_budget(named, shapes, sparsity=sparsity, least=least)
    total = sum(shape.dense_bytes for shape in shapes.values())
    assert all(0.05 <= share <= 1.0 for share in shares.values())
    spent = sum(shares[name] * shapes[name].dense_bytes for name in named)
    assert spent == pytest.approx((1 - sparsity) * total, rel=1e-9)
    free = [shares[name] / named[name] for name in named if 0.05 < shares[name] < 1.0]
    assert free == pytest.approx([free[0]] * len(free)) if free else True


def test_least_shares_above_the_budget_are_refused() -> None:
    with pytest.raises(SparsifyError, match=r"sparsity 0\.9 leaves less"):
        fill_budget({"a": 1.0}, {"a": LinearShape(4, 4, 4)}, sparsity=0.9, least={"a": 0.2})


def test_an_unknown_allocation_is_refused(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    assert {"uniform", "greedy", "larosa", "sensitivity"} <= set(available())
    with pytest.raises(SparsifyError, match=r"unknown allocation 'greddy'.*Did you mean 'greedy'"):
        sparsify.convert(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation="greddy")
    assert get_allocation("greedy") == Greedy()


@pytest.mark.parametrize("allocation", ["greedy", "sensitivity"])
def test_a_recipe_and_an_allocation_are_one_too_many(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, allocation: str
) -> None:
    recipe = {"model.layers.0.mlp.up_proj": {"sparsity": 0.3, "rho": 1.0}}
    with pytest.raises(SparsifyError, match=f"allocation {allocation} chooses each linear's share, and so does"):
        sparsify.convert(tiny_llama, RSparse(0.5, recipe=recipe), tiny_calibration, allocation=allocation)


@pytest.mark.parametrize(
    ("allocation", "options", "message"),
    [
        (Greedy, {"step": 0.0}, "step of allocation greedy is 0"),
        (Greedy, {"step": 5}, "step of allocation greedy is 5: it must be in"),
        (Greedy, {"windows": 0}, "windows of allocation greedy is 0"),
        (Greedy, {"most": 1.0}, "most of allocation greedy is 1.0"),
        (Sensitivity, {"steps": -1}, "steps of allocation sensitivity is -1"),
        (Sensitivity, {"batch": 2.5}, "batch of allocation sensitivity is 2.5"),
    ],
    ids=str,
)
def test_bad_options_are_refused(allocation: type, options: dict[str, float], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        allocation(**options)


@pytest.mark.parametrize("allocation", ALLOCATIONS[1:], ids=lambda allocation: allocation.name)
def test_linears_stored_transposed_and_with_biases(tiny_calibration: Calibration, allocation: Allocation) -> None:
    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    sparsify.convert(model, Wina(sparsity=0.5), tiny_calibration, allocation=allocation)
    assert sparsify.ledger_of(model).weighted_sparsity == pytest.approx(0.5, abs=1e-6)
    sparsities = {entry.sparsity for entry in model.config.quantization_config.linears.values()}
    assert len(sparsities) > 1
