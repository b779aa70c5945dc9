"""The reference kernels against the paper's equation in plain loops, over odd shapes, all dtypes and bad values."""

import math

import pytest
import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.kernels import dispatch
from sparsify.kernels.reference import (
    BACKEND,
    keep_mask,
    residual_tensors,
    sparse_linear,
    sparse_linear_residual,
)
from sparsify.kernels.spec import SparseTensors

# [outputs, inputs, rank]
SHAPES = [(1, 1, 0), (1, 1, 1), (3, 5, 0), (5, 3, 2), (7, 1, 1), (1, 13, 1), (17, 31, 4), (33, 8, 8)]

# Two roundings of the output and one of each operand: eps times the root of the sum's length, with room.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def tensors(
    outputs: int,
    inputs: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    threshold: float = 0.6,
    scaled: bool = True,
    bias: bool = True,
) -> SparseTensors:
    return SparseTensors(
        weight=torch.randn(outputs, inputs).to(dtype),
        bias=torch.randn(outputs).to(dtype) if bias else None,
        threshold=torch.tensor(threshold),
        scale=torch.rand(inputs) + 0.5 if scaled else None,
        lr_a=torch.randn(rank, inputs).to(dtype) if rank else None,
        lr_b=torch.randn(outputs, rank).to(dtype) if rank else None,
    )


def paper_form(x: Tensor, t: SparseTensors) -> Tensor:
    """y = W (m ⊙ x) + L ((1 − m) ⊙ x) + b, m_j = 1[|x_j| c_j > t], one number at a time in fp64."""
    outputs, inputs = t.weight.shape
    rows = x.reshape(-1, inputs)
    y = torch.zeros(len(rows), outputs, dtype=torch.float64)
    for n, row in enumerate(rows.tolist()):
        for i in range(outputs):
            total = float(t.bias[i]) if t.bias is not None else 0.0
            for j in range(inputs):
                score = abs(row[j]) * (float(t.scale[j]) if t.scale is not None else 1.0)
                if score > float(t.threshold):
                    total += float(t.weight[i, j]) * row[j]
                elif t.lr_a is not None and t.lr_b is not None:
                    low = sum(float(t.lr_b[i, r]) * float(t.lr_a[r, j]) for r in range(len(t.lr_a)))
                    total += low * row[j]
            y[n, i] = total
    return y.reshape(*x.shape[:-1], outputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_papers_form(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t = tensors(*shape, dtype=dtype)
    x = torch.randn(2, 3, shape[1]).to(dtype)
    expected = paper_form(x, t)
    found = sparse_linear(x, t)
    assert found.dtype == dtype
    scale = max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_optional_tensors(scaled: bool, bias: bool) -> None:
    t = tensors(5, 7, 2, scaled=scaled, bias=bias)
    x = torch.randn(4, 7)
    torch.testing.assert_close(sparse_linear(x, t).double(), paper_form(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_form_equals_the_papers_form(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t = tensors(*shape, dtype=dtype)
    x = torch.randn(6, shape[1]).to(dtype)
    expected = sparse_linear(x, t)
    found = sparse_linear_residual(x, residual_tensors(t))
    # R = W − BA is rounded once more than W, and BA x is added for all channels, then taken off for the kept ones.
    scale = max(1.0, float(expected.abs().max())) * max(1, shape[2])
    assert float((found.double() - expected.double()).abs().max()) <= TOLERANCE[dtype] * scale


def test_residual_tensors_of_a_full_rank_is_zero() -> None:
    t = tensors(6, 4, 0, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(t.weight, full_matrices=False)
    full = SparseTensors(t.weight, t.bias, t.threshold, t.scale, s[:, None] * vh, u)
    assert float(residual_tensors(full).weight.abs().max()) < 1e-13
    assert residual_tensors(t) is t


def test_the_dense_linear_where_all_channels_are_kept() -> None:
    t = tensors(9, 11, 3, threshold=-1.0)
    x = torch.randn(5, 11)
    x[0, 0] = 0.0
    assert torch.equal(sparse_linear(x, t), torch.nn.functional.linear(x, t.weight, t.bias))


def test_only_bias_and_low_rank_where_no_channel_is_kept() -> None:
    x = torch.randn(5, 11)
    t = tensors(9, 11, 0, threshold=1e30)
    assert torch.equal(sparse_linear(x, t), t.bias.expand(5, 9))
    t = tensors(9, 11, 3, threshold=1e30, bias=False)
    torch.testing.assert_close(sparse_linear(x, t), x @ t.lr_a.t() @ t.lr_b.t())


def test_the_cut_is_strict() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert keep_mask(x, torch.tensor(1.0)).tolist() == [True, False, False, False, True]
    assert keep_mask(x, torch.tensor(0.0)).tolist() == [True, True, False, True, True]
    assert keep_mask(x, torch.tensor(-1.0)).all()
    assert keep_mask(x, torch.tensor(1.0), torch.tensor([0.5, 2.0, 9.0, 1.0, 0.0])).tolist() == [
        False, True, False, False, False,
    ]  # fmt: skip


def test_scores_are_compared_in_fp32() -> None:
    threshold = torch.tensor(1.0 + 2**-12)
    x = torch.ones(3, dtype=torch.bfloat16)
    assert not keep_mask(x, threshold).any()
    assert keep_mask(x, threshold, torch.tensor([1.0, 1.0 + 2**-11, 2.0])).tolist() == [False, True, True]


@pytest.mark.parametrize("form", [sparse_linear, sparse_linear_residual], ids=["paper", "residual"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [0, 2])
def test_values_that_are_not_finite_reach_the_output(rank: int, bad: float, form: object) -> None:
    assert callable(form)
    t = tensors(4, 6, rank)
    x = torch.randn(3, 6)
    x[1, 2] = bad
    y = form(x, t)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0), (2, 3, 4)], ids=str)
def test_any_number_of_tokens(lead: tuple[int, ...]) -> None:
    t = tensors(4, 6, 2)
    x = torch.randn(*lead, 6)
    (y,) = BACKEND.run(x, (t,))
    assert y.shape == (*lead, 4)
    torch.testing.assert_close(y.double(), paper_form(x, t), rtol=1e-5, atol=1e-5)


def test_one_call_serves_a_site() -> None:
    site = [tensors(4, 6, 2), tensors(3, 6, 0, scaled=False), tensors(8, 6, 1, bias=False)]
    x = torch.randn(2, 6)
    found = BACKEND.run(x, site)
    assert len(found) == 3
    for y, t in zip(found, site, strict=True):
        assert torch.equal(y, sparse_linear(x, t))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_channel_contiguous_weights_give_the_same(dtype: torch.dtype) -> None:
    t = tensors(9, 11, 2, dtype=dtype)
    turned = SparseTensors(t.weight.t().contiguous().t(), t.bias, t.threshold, t.scale, t.lr_a, t.lr_b)
    x = torch.randn(5, 11).to(dtype)
    torch.testing.assert_close(sparse_linear(x, turned), sparse_linear(x, t), rtol=TOLERANCE[dtype], atol=1e-2)


def test_the_reference_backend_is_always_there() -> None:
    assert BACKEND in dispatch.backends()
    chosen = dispatch.select_backend(torch.device("meta"), torch.float64, 1, 1, name="reference")
    assert chosen is BACKEND


def test_unknown_backend_is_one_clear_error() -> None:
    with pytest.raises(SparsifyError, match=r"unknown backend 'referense'.*Did you mean 'reference'\?"):
        dispatch.select_backend(torch.device("cpu"), torch.float32, 4, 4, name="referense")
