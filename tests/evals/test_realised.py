"""Realised density against counts made by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.errors import SparsifyError
from sparsify.evals.realised import RealisedDensity
from sparsify.linear import SparsitySwitch, make_sparse
from sparsify.runtime import dense, set_prefill


class _TwoLayers(nn.Module):
    """An unscaled layer with threshold 1 and a scaled one, both on the same input [.., 4]."""

    def __init__(self) -> None:
        super().__init__()
        switch = SparsitySwitch()
        self.first = make_sparse(nn.Linear(4, 3), scaled=False, rank=0, switch=switch)
        self.second = make_sparse(nn.Linear(4, 2), scaled=True, rank=0, switch=switch)
        self.first.threshold.fill_(1.0)
        self.second.threshold.fill_(1.0)
        assert self.second.scale is not None
        self.second.scale.copy_(torch.tensor([2.0, 2.0, 0.1, 0.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def _model() -> Any:
    return _TwoLayers()


def test_kept_channels_are_counted_over_tokens() -> None:
    model = _model()
    # |x| > 1 keeps 2 + 1 + 0 channels (1 itself is cut); |x|·scale > 1 keeps 2 + 1 + 0.
    x = torch.tensor([[2.0, -3.0, 1.0, 0.5], [0.6, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    with RealisedDensity(model) as realised:
        model(x)
    assert realised.densities() == {"first": 3 / 12, "second": 3 / 12}
    assert realised.tokens == 3


def test_batches_add_up_and_nan_is_kept() -> None:
    model = _model()
    with RealisedDensity(model) as realised:
        model(torch.full((2, 3, 4), 2.0))
        model(torch.tensor([[[float("nan"), 0.0, 0.0, 0.0]]]))
    assert realised.densities()["first"] == pytest.approx((6 * 4 + 1) / 28)
    assert realised.tokens == 7


def test_dense_runs_and_runs_outside_are_not_counted() -> None:
    model = _model()
    x = torch.full((1, 4), 2.0)
    with RealisedDensity(model) as realised:
        with dense(model):
            model(x)
        assert realised.densities() == {}
        assert realised.tokens == 0
        model(x)
    model(torch.zeros(5, 4))
    assert realised.densities() == {"first": 1.0, "second": 0.5}
    assert not model.first._forward_pre_hooks


def test_hooks_are_removed_after_an_error() -> None:
    model = _model()
    with pytest.raises((RuntimeError, SparsifyError)), RealisedDensity(model):
        model(torch.zeros(1, 5))
    assert not model.first._forward_pre_hooks


def test_a_dense_prefill_is_not_counted() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    switch = SparsitySwitch()
    name = "model.layers.0.mlp.down_proj"
    model.set_submodule(name, make_sparse(model.get_submodule(name), scaled=False, rank=0, switch=switch))
    set_prefill(model, "dense")
    with RealisedDensity(model) as realised, torch.no_grad():
        model(torch.arange(6)[None])
        assert realised.tokens == 0
        model(torch.arange(1)[None])
    assert realised.tokens == 1
    # The unfitted threshold keeps every channel.
    assert realised.densities() == {name: 1.0}
