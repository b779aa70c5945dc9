"""Lists of kept channels, exactly as torch finds them, and the low-rank rest of the dropped ones."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.gpu.site import Lists, run_select
from sparsify.kernels.reference import keep_mask
from sparsify.kernels.spec import SparseTensors

Make = Callable[..., SparseTensors]


def assert_lists(lists: Lists | None, x: Tensor, site: list[SparseTensors]) -> None:
    """The channels that some token keeps, in order."""
    assert lists is not None
    assert lists.index.dtype == lists.count.dtype == torch.int32
    for row, number, t in zip(lists.index.view(len(site), -1), lists.count.tolist(), site, strict=True):
        expected = keep_mask(x, t.threshold, t.scale).any(0).nonzero().flatten()
        assert row[:number].tolist() == expected.tolist()


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_lists_of_a_site(count: int, tokens: int, linear: Make, scratch: Scratch, device: torch.device) -> None:
    x = torch.randn(tokens, 100).to(device, torch.bfloat16)
    site = [linear(1, 100, dtype=x.dtype, threshold=1.0 + 0.5 * k, scaled=count != 2) for k in range(count)]
    assert_lists(run_select(x, site, scratch=scratch), x, site)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lists_in_other_dtypes(dtype: torch.dtype, linear: Make, scratch: Scratch, device: torch.device) -> None:
    x = torch.randn(2, 100).to(device, dtype)
    site = [linear(1, 100, dtype=dtype)]
    assert_lists(run_select(x, site, scratch=scratch), x, site)


@pytest.mark.parametrize("channels", [1, 2, 4096, 4097, 14000])
def test_lists_of_many_channels(channels: int, linear: Make, scratch: Scratch, device: torch.device) -> None:
    """More than 4096 are the work of several programs, each of which counts what is before its own."""
    for tokens in (1, 2):
        x = torch.randn(tokens, channels).to(device, torch.bfloat16)
        site = [linear(1, channels, dtype=x.dtype, threshold=threshold) for threshold in (0.7, 2.0)]
        assert_lists(run_select(x, site, scratch=scratch), x, site)


def test_lists_of_all_of_none_and_at_the_cut(linear: Make, scratch: Scratch, device: torch.device) -> None:
    x = torch.randn(1, 70).to(device, torch.bfloat16)
    x[0, 7], x[0, 8], x[0, 9] = math.nan, math.inf, 0.0
    at = x[0, 20].float().abs()
    for threshold in (
        -1.0,
        0.0,
        math.inf,
        math.nan,
        float(at),
        float(at.nextafter(at + 1)),
        float(at.nextafter(at - 1)),
    ):
        site = [linear(1, 70, dtype=x.dtype, threshold=threshold, scaled=False) for _ in range(2)]
        assert_lists(run_select(x, site, scratch=scratch), x, site)


@pytest.mark.parametrize(("tokens", "indexed"), [(1, True), (5, False), (5, True)], ids=str)
@pytest.mark.parametrize("ranks", [(4,), (1, 9), (5, 0, 7)], ids=str)
def test_low_rank_rest(
    ranks: tuple[int, ...], tokens: int, indexed: bool, linear: Make, scratch: Scratch, device: torch.device
) -> None:
    """t = A (x ⊙ ¬keep) in fp32, where keep is the linear's own."""
    x = torch.randn(tokens, 100).to(device, torch.bfloat16)
    site = [linear(2, 100, rank, dtype=x.dtype, threshold=0.5 + 0.3 * k) for k, rank in enumerate(ranks)]
    low = scratch.empty(tokens * sum(ranks), torch.float32)
    lists = run_select(x, site, scratch=scratch, low=low, indexed=indexed)
    if indexed:
        assert_lists(lists, x, site)
    else:
        assert lists is None
    parts = low.split([tokens * rank for rank in ranks])
    for part, rank, t in zip(parts, ranks, site, strict=True):
        if not rank:
            continue
        rest = torch.where(keep_mask(x, t.threshold, t.scale), 0.0, x).double()
        expected, size = rest @ t.lr_a.double().t(), rest.abs() @ t.lr_a.double().abs().t()
        assert ((part.view(tokens, rank).double() - expected).abs() <= 12 * 2**-23 * size).all()


def test_low_rank_of_many_channels(linear: Make, scratch: Scratch, device: torch.device) -> None:
    """More than 1024 take several turns; A is read for every one of them."""
    x = torch.randn(1, 2500).to(device)
    t = linear(2, 2500, 2, threshold=math.inf)
    low = scratch.empty(2, torch.float32)
    run_select(x, [t], scratch=scratch, low=low, indexed=False)
    expected = x.double() @ t.lr_a.double().t()
    assert ((low - expected[0]).abs() <= 50 * 2**-23 * (x.double().abs() @ t.lr_a.double().abs().t())[0]).all()


@pytest.mark.parametrize("channels", [50, 5000])
def test_relu_lists_and_cleared_memory(channels: int, linear: Make, scratch: Scratch, device: torch.device) -> None:
    """Neurons above the cut, NaN among them; the memory is 0 and nothing behind it is."""
    gate = torch.randn(1, channels).to(device, torch.bfloat16)
    gate[0, 3], gate[0, 4], gate[0, 5], gate[0, 6] = math.nan, math.inf, -math.inf, 0.0
    for cut in (0.0, 0.5):
        buffer = torch.full((channels + 16,), 7.0, device=device, dtype=gate.dtype)
        t = linear(1, channels, dtype=gate.dtype, threshold=cut, scaled=False)
        lists = run_select(gate, [t], scratch=scratch, relu=True, clear=buffer[:channels])
        assert lists is not None
        expected = (~(gate[0].float() <= cut)).nonzero().flatten()
        assert lists.count.tolist() == [len(expected)]
        assert lists.index[: len(expected)].tolist() == expected.tolist()
        assert not buffer[:channels].any()
        assert (buffer[channels:] == 7).all()


@pytest.mark.parametrize("rank", [0, 3])
def test_lists_and_rest_of_a_gated_input(rank: int, linear: Make, scratch: Scratch, device: torch.device) -> None:
    gate, up = torch.randn(2, 100).to(device), torch.randn(2, 100).to(device)
    x = gate.clamp(min=0) * up
    site = [linear(1, 100, rank, threshold=0.1)]
    low = scratch.empty(2 * rank, torch.float32) if rank else None
    assert_lists(run_select(gate, site, scratch=scratch, up=up, activation="relu", low=low), x, site)
    if low is not None:
        t = site[0]
        rest = torch.where(keep_mask(x, t.threshold, t.scale), 0.0, x).double()
        torch.testing.assert_close(low.view(2, rank).double(), rest @ t.lr_a.double().t(), rtol=1e-5, atol=1e-6)


def test_lists_end_where_the_memory_does(linear: Make, scratch: Scratch, device: torch.device) -> None:
    """Nothing is written beside a linear's own row: the first keeps all, the second none."""
    x = torch.randn(1, 33).to(device)
    keeps_all = linear(1, 33, threshold=-1.0)
    keeps_none = replace(keeps_all, threshold=torch.tensor(math.inf, device=device))
    lists = run_select(x, [keeps_all, keeps_none], scratch=scratch)
    assert lists is not None
    assert lists.count.tolist() == [33, 0]
    assert (lists.index[33:] == torch.iinfo(torch.int32).max).all()
