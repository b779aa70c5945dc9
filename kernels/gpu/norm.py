"""Residual sum and RMSNorm of one token in one program, and for one token also the lists of kept channels.

    r = residual + delta;   x = weight · round(r · (mean(r²) + ε)^-½)

rounded where transformers' modules round: r after the sum, the normalised value before the weight. With SELECT, for
one token, index_l and count_l of `select` come out of the same launch. Covered: widths up to BLOCK.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.gpu.common import kept
from sparsify.kernels.gpu.launch import launch
from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.gpu.site import MOST_LINEARS, Lists
from sparsify.kernels.spec import SparseTensors

# Above it a program has no room for a token in its registers.
MOST_WIDTH = 16384


@triton.jit
def add_norm(
    residual,  # [T, K]; r is written back here where ADD
    delta,  # [T, K], where ADD
    weight,  # [K]
    x,  # [T, K]
    index,  # [L, K] int32, where SELECT
    count,  # [L] int32, where SELECT
    threshold0, threshold1, threshold2,
    scale0, scale1, scale2,
    width,
    epsilon,
    ADD: tl.constexpr,
    SELECT: tl.constexpr,  # how many linears: 0 to 3
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    at = token * width + channel
    value = tl.load(residual + at, mask=inside, other=0.0)
    if ADD:
        other = tl.load(delta + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(residual + at, value, mask=inside)
    wide = value.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + epsilon)
    gain = tl.load(weight + channel, mask=inside, other=0.0)
    normed = (scaled.to(gain.dtype).to(tl.float32) * gain.to(tl.float32)).to(gain.dtype)
    tl.store(x + at, normed, mask=inside)
    if SELECT > 0:
        _list(normed, channel, inside, index, count, threshold0, scale0, SCALED)
    if SELECT > 1:
        _list(normed, channel, inside, index + width, count + 1, threshold1, scale1, SCALED)
    if SELECT > 2:
        _list(normed, channel, inside, index + 2 * width, count + 2, threshold2, scale2, SCALED)


@triton.jit
def _list(value, channel, inside, index, count, threshold, scale, SCALED: tl.constexpr):
    used = kept(value.to(tl.float32), channel, inside, tl.load(threshold), scale, SCALED).to(tl.int32)
    tl.store(index + tl.cumsum(used, axis=0) - used, channel, mask=used > 0)
    tl.store(count, tl.sum(used, axis=0))


def run_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    epsilon: float,
    *,
    scratch: Scratch,
    select_for: Sequence[SparseTensors] = (),
) -> tuple[Tensor, Lists | None]:
    """Returns x [T, K] and, for one token and the linears of `select_for`, the lists of its kept channels.

    residual [T, K] is changed: delta [T, K] is added to it, where there is one.
    """
    tokens, width = residual.shape
    x = scratch.empty(tokens * width, residual.dtype).view(tokens, width)
    lists = None
    if select_for:
        assert tokens == 1
        size = len(select_for)
        lists = Lists(scratch.empty(size * width, torch.int32), scratch.empty(size, torch.int32))
    nothing = [None] * (MOST_LINEARS - len(select_for))
    launch(
        add_norm,
        (tokens,),
        residual,
        delta,
        weight,
        x,
        None if lists is None else lists.index,
        None if lists is None else lists.count,
        *[t.threshold for t in select_for], *nothing,
        *[t.scale for t in select_for], *nothing,
        width,
        epsilon,
        ADD=delta is not None,
        SELECT=len(select_for),
        SCALED=bool(select_for) and select_for[0].scale is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return x, lists
