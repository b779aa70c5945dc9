"""What a site's product needs beforehand: the list of kept channels, and the low-rank rest of the dropped ones.

    index_l = the channels j, in order, with keep_l[t, j] for some token t;   count_l = how many
    t_l = A_l (x ⊙ ¬keep_l)                                                   [T, R_l] in fp32

One launch for all linears of a site. A program of the first kind looks at SEGMENT channels, counts the kept ones before
them and writes its own in their places: no program waits for another. A program of the second kind is a block of rows
of A_l and one token. Covered: 1 to 8 tokens. Not needed: for a masked product without low-rank rows.
"""

import triton
import triton.language as tl

from sparsify.kernels.gpu.common import kept, load_input


@triton.jit
def select(
    x,  # [T, K], or the gate's output where GATED
    up,  # [T, K], where GATED
    clear,  # [K], set to 0 where CLEAR
    index,  # [L, K] int32, where INDEXED
    count,  # [L] int32, where INDEXED
    low,  # one [T, R_l] fp32 after the other, where RANKED
    threshold0, threshold1, threshold2,
    scale0, scale1, scale2,
    a0, a1, a2,  # A_l [R_l, K]
    rank0, rank1, rank2,
    channels,
    tokens,
    LINEARS: tl.constexpr,
    SCALED: tl.constexpr,
    RANKED: tl.constexpr,
    INDEXED: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RELU: tl.constexpr,  # the list is of max(x, 0) above the threshold, one linear and token
    CLEAR: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    segments = 0
    if INDEXED:
        segments = tl.cdiv(channels, SEGMENT)
        if program < LINEARS * segments:
            linear = program // segments
            threshold, scale = threshold0, scale0
            if LINEARS > 1:
                if linear == 1:
                    threshold, scale = threshold1, scale1
            if LINEARS > 2:
                if linear == 2:
                    threshold, scale = threshold2, scale2
            _list(
                x, up, index + linear * channels, count + linear, threshold, scale, channels, tokens,
                program % segments, segments, SCALED, GATED, ACTIVATION, RELU, SEGMENT,
            )  # fmt: skip
            if CLEAR:
                channel = program * SEGMENT + tl.arange(0, SEGMENT)
                tl.store(clear + channel, tl.zeros([SEGMENT], clear.dtype.element_ty), mask=channel < channels)
    if RANKED:
        program = program - LINEARS * segments
        if program >= 0:
            token = program % tokens
            block = program // tokens
            first, low_start = 0, 0
            threshold, scale, a, rank = threshold0, scale0, a0, rank0
            if LINEARS > 1:
                blocks0 = tl.cdiv(rank0, BLOCK_R)
                if block >= blocks0:
                    first, low_start = blocks0, rank0
                    threshold, scale, a, rank = threshold1, scale1, a1, rank1
            if LINEARS > 2:
                blocks1 = tl.cdiv(rank0, BLOCK_R) + tl.cdiv(rank1, BLOCK_R)
                if block >= blocks1:
                    first, low_start = blocks1, rank0 + rank1
                    threshold, scale, a, rank = threshold2, scale2, a2, rank2
            _low_rank(
                x + token * channels, up + token * channels, low + tokens * low_start + token * rank, threshold, scale,
                a, rank, channels, block - first, SCALED, GATED, ACTIVATION, BLOCK_R, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _list(
    x, up, index, count, threshold, scale, channels, tokens, segment, segments,
    SCALED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, RELU: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    cut = tl.load(threshold)
    before = 0
    for other in tl.range(0, segment):
        used = _union(x, up, other * SEGMENT, cut, scale, channels, tokens, SCALED, GATED, ACTIVATION, RELU, SEGMENT)
        before += tl.sum(used, axis=0)
    first = segment * SEGMENT
    used = _union(x, up, first, cut, scale, channels, tokens, SCALED, GATED, ACTIVATION, RELU, SEGMENT)
    place = before + tl.cumsum(used, axis=0) - used
    tl.store(index + place, first + tl.arange(0, SEGMENT), mask=used > 0)
    if segment == segments - 1:
        tl.store(count, before + tl.sum(used, axis=0))


@triton.jit
def _union(
    x, up, first, cut, scale, channels, tokens,
    SCALED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, RELU: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """1 for the channels of a segment that some token keeps."""
    channel = first + tl.arange(0, SEGMENT)
    inside = channel < channels
    used = tl.zeros([SEGMENT], tl.int32)
    for token in tl.range(0, tokens):
        value = load_input(x + token * channels, up + token * channels, channel, inside, GATED, ACTIVATION)
        if RELU:
            value = tl.where(value <= 0.0, 0.0, value)
        used = used | kept(value, channel, inside, cut, scale, SCALED).to(tl.int32)
    return used


@triton.jit
def _low_rank(
    x, up, low, threshold, scale, a, rank, channels, block,
    SCALED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    cut = tl.load(threshold)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for position in tl.range(0, channels, BLOCK_K, num_stages=3):
        channel = position + tl.arange(0, BLOCK_K)
        inside = channel < channels
        value = load_input(x, up, channel, inside, GATED, ACTIVATION)
        value = tl.where(kept(value, channel, inside, cut, scale, SCALED), 0.0, value)
        there = (r < rank)[:, None] & inside[None, :]
        tile = tl.load(a + r[:, None].to(tl.int64) * channels + channel[None, :], mask=there, other=0.0)
        total += value[None, :] * tile.to(tl.float32)
    tl.store(low + r, tl.sum(total, axis=1), mask=r < rank)
