"""Rows of up for the neurons whose gate is not 0: the ReLU and FATReLU form of the gated MLP, one token.

    h_f = a_f · (up_f · (x ⊙ keep) + b_f) for the neurons f on the list, 0 for all others;  a = act(gate), on the list

act(g) = g where g > cut, else 0. A program takes BLOCK_F neurons of the list and reads their rows of up [F, K], which
stands row-major; nothing of another row is read. h is written dense, so that down can take it as any input.
Not covered: several tokens (their union is larger than one token's, and `gemv` reads it with gate and up together).
"""

import triton
import triton.language as tl

from sparsify.kernels.gpu.common import kept


@triton.jit
def relu_rows(
    x,  # [K]
    gate,  # [F], before the activation
    index,  # [F] int32: neurons whose gate is above the cut, in order
    count,  # [1] int32
    up,  # [F, K]
    bias,  # [F], where BIASED
    h,  # [F], zero before
    threshold,
    scale,
    channels,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cut = tl.load(threshold)
    number = tl.load(count)
    f = tl.arange(0, BLOCK_F)
    for block in tl.range(tl.program_id(0), tl.cdiv(number, BLOCK_F), tl.num_programs(0)):
        active = block * BLOCK_F + f < number
        neuron = tl.load(index + block * BLOCK_F + f, mask=active, other=0)
        total = tl.zeros([BLOCK_F, BLOCK_K], tl.float32)
        for position in tl.range(0, channels, BLOCK_K, num_stages=3):
            channel = position + tl.arange(0, BLOCK_K)
            inside = channel < channels
            value = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(kept(value, channel, inside, cut, scale, SCALED), value, 0.0)
            there = active[:, None] & inside[None, :]
            tile = tl.load(up + neuron[:, None].to(tl.int64) * channels + channel[None, :], mask=there, other=0.0)
            total += value[None, :] * tile.to(tl.float32)
        product = tl.sum(total, axis=1)
        if BIASED:
            product += tl.load(bias + neuron, mask=active, other=0.0).to(tl.float32)
        a = tl.load(gate + neuron, mask=active, other=0.0)
        product = product.to(a.dtype).to(tl.float32) * a.to(tl.float32)
        tl.store(h + neuron, product.to(h.dtype.element_ty), mask=active)
