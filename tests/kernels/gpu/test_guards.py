"""Every kernel between guards: nothing is written beside its memory, and nothing beside its inputs shows."""

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from sparsify.kernels.gpu.attention import run_attention
from sparsify.kernels.gpu.gate import run_gate
from sparsify.kernels.gpu.norm import run_norm
from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.gpu.site import run_select, run_site
from sparsify.kernels.gpu.tiles import Tile
from sparsify.kernels.spec import SparseTensors

Make = Callable[..., SparseTensors]

TILE = Tile(block_n=64, block_k=32, splits=2, warps=4, stages=2)
# Values on either side; a multiple of 16 bytes, so that what is between is aligned as usual.
_GUARD, _MARK = 256, 77


class Guarded(Scratch):
    """Work memory with guards on both sides of each piece."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, size=512)
        self.buffers: list[Tensor] = []

    def empty(self, number: int, dtype: torch.dtype) -> Tensor:
        buffer = torch.full((number + 2 * _GUARD,), _MARK, dtype=dtype, device=self.device)
        self.buffers.append(buffer)
        middle = buffer[_GUARD : _GUARD + number]
        return middle.copy_(torch.empty_like(middle))

    def assert_intact(self) -> None:
        assert self.buffers
        for buffer in self.buffers:
            assert (buffer[:_GUARD] == _MARK).all()
            assert (buffer[-_GUARD:] == _MARK).all()
        assert not self._ring.any()


@pytest.fixture
def guarded(device: torch.device) -> Guarded:
    return Guarded(device)


def in_nan(tensor: Tensor) -> Tensor:
    """The same tensor in the same strides, with NaN before and behind it."""
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    wide = torch.full((len(flat) + 2 * _GUARD,), math.nan, dtype=tensor.dtype, device=tensor.device)
    wide[_GUARD:-_GUARD] = flat
    return wide.as_strided(tensor.shape, tensor.stride(), _GUARD + tensor.storage_offset())


def all_in_nan(t: SparseTensors) -> SparseTensors:
    values = {field.name: getattr(t, field.name) for field in fields(t) if field.name != "density"}
    return replace(t, **{name: None if value is None else in_nan(value) for name, value in values.items()})


@pytest.mark.parametrize("indexed", [False, True], ids=["masked", "indexed"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_site(tokens: int, indexed: bool, linear: Make, guarded: Guarded, device: torch.device) -> None:
    """Odd sizes; everything is kept, and half."""
    for threshold in (-1.0, 0.6):
        x = torch.randn(tokens, 37).to(device)
        site = [linear(n, 37, rank, threshold=threshold) for n, rank in ((33, 0), (1, 3), (65, 5))]
        expected = run_site(x, site, scratch=Scratch(device, size=64), indexed=indexed, tile=TILE)
        surrounded = [all_in_nan(t) for t in site]
        found = run_site(in_nan(x), surrounded, scratch=guarded, indexed=indexed, tile=TILE)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        guarded.assert_intact()


@pytest.mark.parametrize("channels", [37, 5000])
def test_select(channels: int, linear: Make, guarded: Guarded, device: torch.device) -> None:
    x = in_nan(torch.randn(3, channels).to(device))
    site = [all_in_nan(linear(1, channels, rank)) for rank in (3, 0)]
    lists = run_select(x, site, scratch=guarded, low=guarded.empty(9, torch.float32))
    assert lists is not None
    guarded.assert_intact()


@pytest.mark.parametrize("tokens", [1, 3])
def test_norm(tokens: int, linear: Make, guarded: Guarded, device: torch.device) -> None:
    residual, delta, weight = (in_nan(torch.randn(shape).to(device)) for shape in ((tokens, 37), (tokens, 37), (37,)))
    site = [all_in_nan(linear(1, 37, threshold=-1.0)) for _ in range(3)] if tokens == 1 else []
    x, _ = run_norm(residual, delta, weight, 1e-5, scratch=guarded, select_for=site)
    assert x.isfinite().all()
    guarded.assert_intact()
    # The residual's own guards are NaN still: it is written to.
    assert residual.as_strided((_GUARD,), (1,), 0).isnan().all()
    assert residual.as_strided((_GUARD,), (1,), _GUARD + residual.numel()).isnan().all()


def test_gate(guarded: Guarded, device: torch.device) -> None:
    gate, up = (in_nan(torch.randn(3, 37).to(device)) for _ in range(2))
    assert run_gate(gate, up, "silu", scratch=guarded).isfinite().all()
    guarded.assert_intact()


@pytest.mark.parametrize("size", [24, 80])
def test_attention(size: int, guarded: Guarded, device: torch.device) -> None:
    """The last position of caches, with NaN behind them."""
    caches = [in_nan(torch.randn(2, 2, 70, size).to(device)) for _ in range(2)]
    q, k, v = (in_nan(torch.randn(2, heads * size).to(device)) for heads in (6, 2, 2))
    angles = [in_nan(torch.randn(70, size).to(device)) for _ in range(2)]
    y = run_attention(
        q, k, v, *caches, *angles, torch.tensor(69, device=device), scaling=0.2, window=None, scratch=guarded
    )
    assert y.isfinite().all()
    guarded.assert_intact()
    for cache in caches:
        assert cache.isfinite().all()
        assert cache.as_strided((_GUARD,), (1,), 0).isnan().all()
        assert cache.as_strided((_GUARD,), (1,), _GUARD + cache.numel()).isnan().all()
