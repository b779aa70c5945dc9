"""Rows of up for the neurons on a list, by the kernel itself: what is read, what is written, and in which turns."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsify.kernels.gpu.rows import relu_rows
from sparsify.kernels.reference import sparse_linear
from sparsify.kernels.spec import SparseTensors

Make = Callable[..., SparseTensors]


def launched(x: Tensor, gate: Tensor, on: list[int], t: SparseTensors, *, programs: int = 8) -> Tensor:
    """h [F], where nobody writes 7."""
    index = torch.tensor([*on, *[2**30] * (len(gate) - len(on))], dtype=torch.int32, device=x.device)
    count = torch.tensor([len(on)], dtype=torch.int32, device=x.device)
    h = torch.full_like(gate, 7.0)
    relu_rows[(programs,)](
        x, gate, index, count, t.weight, t.bias, h, t.threshold, t.scale, len(x),
        BIASED=t.bias is not None, SCALED=t.scale is not None, BLOCK_F=4, BLOCK_K=64, num_warps=4,
    )  # fmt: skip
    return h


def tensors(linear: Make, neurons: int, channels: int, **options: object) -> SparseTensors:
    t = linear(neurons, channels, **options)
    return SparseTensors(t.weight.contiguous(), t.bias, t.threshold, t.scale)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_on_the_list(dtype: torch.dtype, bias: bool, linear: Make, device: torch.device) -> None:
    """Three turns over the channels; the last neurons of the list are not a whole block."""
    t = tensors(linear, 40, 150, dtype=dtype, bias=bias, scaled=bias)
    x, gate = torch.randn(150).to(device, dtype), torch.randn(40).abs().to(device, dtype)
    on = [0, 1, 5, 17, 20, 39]
    h = launched(x, gate, on, t)
    expected = gate * sparse_linear(x, t)
    step = 4 * max(torch.finfo(dtype).eps, 1e-6)
    assert ((h - expected)[on].abs() <= step * (expected[on].abs() + 0.1)).all()
    off = sorted(set(range(40)) - set(on))
    assert (h[off] == 7).all()


@pytest.mark.parametrize("programs", [1, 3])
def test_more_neurons_than_programs_take_turns(programs: int, linear: Make, device: torch.device) -> None:
    t = tensors(linear, 30, 64, threshold=-1.0)
    x, gate = torch.randn(64).to(device), torch.ones(30, device=device)
    h = launched(x, gate, list(range(30)), t, programs=programs)
    torch.testing.assert_close(h, sparse_linear(x, t), rtol=1e-5, atol=1e-5)


def test_nothing_is_written_for_an_empty_list(linear: Make, device: torch.device) -> None:
    t = tensors(linear, 30, 64)
    x, gate = torch.randn(64).to(device), torch.full((30,), math.nan, device=device)
    assert (launched(x, gate, [], t) == 7).all()


def test_other_rows_and_dropped_channels_do_not_show(linear: Make, device: torch.device) -> None:
    """Rows beside the list are not read; a dropped channel is read with its row, and its finite weight left out."""
    t = tensors(linear, 20, 64, scaled=False, bias=False)
    x, gate = torch.randn(64).to(device), torch.ones(20, device=device)
    on = [2, 3, 11]
    expected = launched(x, gate, on, t)
    t.weight[[row for row in range(20) if row not in on]] = math.nan
    t.weight[:, x.abs() <= 0.6] = 100.0
    assert torch.equal(launched(x, gate, on, t), expected)
