"""Residual sum and RMSNorm against transformers' module, and the lists that come out of the same launch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sparsify.kernels.gpu.norm import run_norm
from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.gpu.site import run_select
from sparsify.kernels.spec import SparseTensors

Make = Callable[..., SparseTensors]


def inputs(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, LlamaRMSNorm]:
    """Residual, what is added to it, and the module."""
    module = LlamaRMSNorm(width, eps=1e-5)
    module.weight.data = torch.randn(width)
    residual, delta = (3 * torch.randn(tokens, width)).to(dtype), torch.randn(tokens, width).to(dtype)
    return residual.to(device), delta.to(device), module.to(device, dtype).requires_grad_(False)


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (8, 100), (3, 5120), (1, 16384)], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["norm", "sum and norm"])
def test_equals_the_module(added: bool, tokens: int, width: int, scratch: Scratch, device: torch.device) -> None:
    residual, delta, module = inputs(tokens, width, torch.float32, device)
    total = residual + delta if added else residual.clone()
    x, lists = run_norm(residual, delta if added else None, module.weight, 1e-5, scratch=scratch)
    assert lists is None
    assert torch.equal(residual, total)
    # The mean of a token's squares and its root: relative errors of a few steps of fp32.
    torch.testing.assert_close(x, module(total), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_where_the_module_rounds(
    dtype: torch.dtype, scratch: Scratch, device: torch.device, rounding: Callable[[torch.dtype], float]
) -> None:
    """The sum before it is normalised, the normalised value before the gain: what is left is a step of the dtype."""
    residual, delta, module = inputs(3, 300, dtype, device)
    exact = residual.double() + delta.double()
    x, _ = run_norm(residual, delta, module.weight, 1e-5, scratch=scratch)
    assert ((residual.double() - exact).abs() <= rounding(dtype) * exact.abs()).all()
    expected = module(residual)
    # A normalised value that falls to the other side of a step, and the rounding of the product.
    step = 2 * torch.finfo(dtype).eps
    assert ((x.double() - expected.double()).abs() <= step * expected.double().abs() + 1e-6).all()
    if device.type == "cuda" or dtype == torch.float16:
        # Nearly all are the same bits; the interpreter truncates to bf16, where the module rounds.
        assert (x == expected).float().mean() > 0.98


@pytest.mark.parametrize(("count", "scaled"), [(1, True), (2, False), (3, True)], ids=str)
def test_lists_are_those_of_select(
    count: int, scaled: bool, linear: Make, scratch: Scratch, device: torch.device
) -> None:
    residual, delta, module = inputs(1, 300, torch.bfloat16, device)
    residual[0, 5] = 0.0
    delta[0, 5] = 0.0
    site = [
        linear(1, 300, dtype=torch.bfloat16, scaled=scaled, threshold=threshold)
        for threshold in (0.5, math.inf, -1.0)[:count]
    ]
    x, found = run_norm(residual, delta, module.weight, 1e-5, scratch=scratch, select_for=site)
    expected = run_select(x, site, scratch=scratch)
    assert found is not None
    assert expected is not None
    assert torch.equal(found.count, expected.count)
    for one, other, number in zip(
        found.index.view(count, -1), expected.index.view(count, -1), found.count.tolist(), strict=True
    ):
        assert torch.equal(one[:number], other[:number])


def test_a_nan_makes_its_token_nan_and_no_other(linear: Make, scratch: Scratch, device: torch.device) -> None:
    residual, delta, module = inputs(3, 100, torch.float32, device)
    residual[1, 50] = math.nan
    x, _ = run_norm(residual, delta, module.weight, 1e-5, scratch=scratch)
    assert x.isnan().all(1).tolist() == [False, True, False]
    assert x.isnan().any(1).tolist() == [False, True, False]
    site = [linear(1, 100, threshold=9.0)]
    _, lists = run_norm(residual[1:2].clone(), None, module.weight, 1e-5, scratch=scratch, select_for=site)
    assert lists is not None
    assert lists.count.tolist() == [100]


def test_a_token_of_zeros_is_zero(scratch: Scratch, device: torch.device) -> None:
    """As many as there are epsilons: no division by 0."""
    zeros = torch.zeros(2, 40, device=device)
    x, _ = run_norm(zeros, None, torch.ones(40, device=device), 1e-6, scratch=scratch)
    assert not x.any()
