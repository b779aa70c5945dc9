"""The L1 term: its value and its gradient against the plain formula, and through gradient checkpointing and LoRA."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.training.finetune import substitute
from sparsify.training.regulariser import L1Regulariser, Reduction

TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(3))


def _regularised(model: Any, reduction: Reduction) -> tuple[Tensor, L1Regulariser]:
    mlps = substitute(model)
    found = L1Regulariser(reduction)
    found.attach({mlp.down: model.get_submodule(mlp.down) for mlp in mlps})
    model.train()
    with found.collecting():
        model(input_ids=TOKENS)
    norm = found.norm()
    assert norm is not None
    return norm, found


def _plain(model: Any, reduction: Reduction) -> tuple[Tensor, float]:
    """Σ over layers of |relu(gate x)·up x|, by the model's own blocks, and the mean share of zeros."""
    substitute(model)
    states: list[Tensor] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda module, args: states.append(args[0])) for block in model.model.layers
    ]
    model.train()
    model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    total, shares = torch.zeros(()), []
    for block, x in zip(model.model.layers, states, strict=True):
        h = torch.relu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
        total = total + (h.abs().mean() if reduction == "mean" else h.abs().sum(-1).mean())
        shares.append(float((h == 0).float().mean()))
    return total, sum(shares) / len(shares)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_gradient_and_zeros_are_the_formulas(tiny_llama: PreTrainedModel, reduction: Reduction) -> None:
    other = copy.deepcopy(tiny_llama)
    norm, found = _regularised(tiny_llama, reduction)
    expected, zeros = _plain(other, reduction)
    assert float(norm) == pytest.approx(float(expected), rel=1e-5)
    norm.backward()
    expected.backward()
    for (name, mine), (_, plain) in zip(tiny_llama.named_parameters(), other.named_parameters(), strict=True):
        if plain.grad is not None:
            assert mine.grad is not None, name
            torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6, msg=name)
    shares = found.take_sparsity()
    assert list(shares) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert sum(shares.values()) / 2 == pytest.approx(zeros)
    assert 0.3 < zeros < 0.7
    assert found.take_sparsity() == {}


def test_gradient_checkpointing_changes_no_gradient(tiny_llama: PreTrainedModel) -> None:
    other = copy.deepcopy(tiny_llama)
    norm, _ = _regularised(tiny_llama, "mean")
    norm.backward()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    again, found = _regularised(other, "mean")
    again.backward()
    for (name, plain), (_, checkpointed) in zip(tiny_llama.named_parameters(), other.named_parameters(), strict=True):
        if plain.grad is not None:
            assert checkpointed.grad is not None, name
            torch.testing.assert_close(checkpointed.grad, plain.grad, rtol=0, atol=0, msg=name)
    # What backward runs again is not counted again.
    assert found.norm() is None


def test_evaluation_is_not_collected(tiny_llama: PreTrainedModel) -> None:
    _, found = _regularised(tiny_llama, "mean")
    found.take_sparsity()
    tiny_llama.eval()
    with found.collecting():
        tiny_llama(input_ids=TOKENS)
    assert found.norm() is None
    assert found.take_sparsity() == {}
