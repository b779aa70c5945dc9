"""The sparse linears of one input site in one launch: q|k|v, o, gate|up or down, for 1 to 8 tokens.

    y_l = W_l (x ⊙ keep_l) + B_l t_l + b_l,   keep_l = ¬(|x| · scale_l ≤ threshold_l) in fp32,   t_l from `select`

Up to three linears, each with its own threshold, scale, low-rank rows and bias, share a launch and nothing else: a
program works on one block of columns of one linear and one part of its channels. Two forms: *masked* asks for the rows
of a block of channels and leaves out the dropped ones; *indexed* walks the list of kept channels that `select` wrote,
cut into equal parts, so that nothing is issued for a dropped channel. x can be act(gate) · up, computed where it is
read: down needs no launch of its own before it.

Several tokens read the union of their channels once, on tensor cores. Sums are in fp32: every program writes a partial
sum, and the last one of a block of columns adds them up in the order of the channels. Two runs give the same bits.
Covered: fp32, bf16, fp16, any shape; weights [O, I] channel-contiguous. Not covered: gradients, more than 8 tokens.
"""

import triton
import triton.language as tl

from sparsify.kernels.gpu.common import kept, load_input


@triton.jit
def sparse_gemv(
    x,  # [T, K], or the gate's output where GATED
    up,  # [T, K], where GATED
    y,  # the outputs, one linear [T, N_l] after the other
    partial,  # [SPLITS, T, N_0 + N_1 + N_2] fp32
    counter,  # [blocks of columns] int32, zero before and after
    index,  # [L, K] int32: kept channels of each linear, in order, where INDEXED
    count,  # [L] int32: how many
    low,  # t_l of the linears, one [T, R_l] after the other, fp32, where RANKED
    w0, w1, w2,
    b0, b1, b2,
    threshold0, threshold1, threshold2,
    scale0, scale1, scale2,
    rows0, rows1, rows2,  # B_l transposed, [R_l, N_l]
    stride0, stride1, stride2,
    n0, n1, n2,
    rank0, rank1, rank2,
    channels,
    tokens,
    LINEARS: tl.constexpr,
    TOKENS: tl.constexpr,  # 1, or 16 for 2 to 8 tokens
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    RANKED: tl.constexpr,
    INDEXED: tl.constexpr,
    CHECKED: tl.constexpr,  # hold channels against the threshold: without a list, or with one that is longer
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,  # every N_l is a multiple of BLOCK_N
    WIDEN: tl.constexpr,  # products of tensor cores in fp32: the interpreter has none in bf16
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    split = tl.program_id(1)
    first = 0
    n, stride, rank = n0, stride0, rank0
    w, bias, threshold, scale, rows = w0, b0, threshold0, scale0, rows0
    start, linear, low_start = 0, 0, 0
    if LINEARS > 1:
        blocks0 = tl.cdiv(n0, BLOCK_N)
        if block >= blocks0:
            first, start, low_start, linear = blocks0, n0, rank0, 1
            n, stride, rank = n1, stride1, rank1
            w, bias, threshold, scale, rows = w1, b1, threshold1, scale1, rows1
    if LINEARS > 2:
        blocks1 = tl.cdiv(n0, BLOCK_N) + tl.cdiv(n1, BLOCK_N)
        if block >= blocks1:
            first, start, low_start, linear = blocks1, n0 + n1, rank0 + rank1, 2
            n, stride, rank = n2, stride2, rank2
            w, bias, threshold, scale, rows = w2, b2, threshold2, scale2, rows2
    columns = (block - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = columns < n
    cut = tl.load(threshold)
    k = tl.arange(0, BLOCK_K)
    t = tl.arange(0, TOKENS)
    if TOKENS == 1:
        total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    else:
        total = tl.zeros([TOKENS, BLOCK_N], tl.float32)

    if INDEXED:
        length = tl.load(count + linear)
    else:
        length = channels
    # Parts are whole numbers of blocks, so that only the last block of all is not full.
    part = tl.cdiv(tl.cdiv(length, BLOCK_K), SPLITS) * BLOCK_K
    begin = split * part
    end = tl.minimum(begin + part, length)
    for position in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        inside = position + k < end
        if INDEXED:
            channel = tl.load(index + linear * channels + position + k, mask=inside, other=0)
        else:
            channel = position + k
        if TOKENS == 1:
            value = load_input(x, up, channel, inside, GATED, ACTIVATION)
            if CHECKED:
                inside = kept(value, channel, inside, cut, scale, SCALED)
            mask = inside[:, None]
            if not EVEN:
                mask = mask & inside_n[None, :]
            tile = tl.load(w + channel[:, None].to(tl.int64) * stride + columns[None, :], mask=mask, other=0.0)
            total += tl.where(inside, value, 0.0)[:, None] * tile.to(tl.float32)
        else:
            at = t[:, None] * channels + channel[None, :]
            there = (t < tokens)[:, None] & inside[None, :]
            value = load_input(x, up, at, there, GATED, ACTIVATION)
            own = kept(value, channel[None, :], there, cut, scale, SCALED)
            any_token = tl.max(own.to(tl.int32), axis=0) > 0
            mask = any_token[:, None]
            if not EVEN:
                mask = mask & inside_n[None, :]
            tile = tl.load(w + channel[:, None].to(tl.int64) * stride + columns[None, :], mask=mask, other=0.0)
            value = tl.where(own, value, 0.0)
            if WIDEN:
                total = tl.dot(value, tile.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(value.to(tile.dtype), tile, total, input_precision="ieee")
    if RANKED:
        part = tl.cdiv(tl.cdiv(rank, BLOCK_K), SPLITS) * BLOCK_K
        end = tl.minimum(split * part + part, rank)
        for position in tl.range(split * part, end, BLOCK_K):
            r = position + k
            mask = (r < end)[:, None] & inside_n[None, :]
            tile = tl.load(rows + r[:, None].to(tl.int64) * n + columns[None, :], mask=mask, other=0.0)
            at = low + tokens * low_start
            if TOKENS == 1:
                total += tl.load(at + r, mask=r < end, other=0.0)[:, None] * tile.to(tl.float32)
            else:
                there = (t < tokens)[:, None] & (r < end)[None, :]
                value = tl.load(at + t[:, None] * rank + r[None, :], mask=there, other=0.0)
                if WIDEN:
                    total = tl.dot(value, tile.to(tl.float32), total, input_precision="ieee")
                else:
                    # Two products keep t to twice the digits of the dtype; an infinite t is whole in the first.
                    high = value.to(tile.dtype)
                    rest = value - high.to(tl.float32)
                    rest = tl.where(tl.abs(high.to(tl.float32)) == float("inf"), 0.0, rest)
                    total = tl.dot(high, tile, total, input_precision="ieee")
                    total = tl.dot(rest.to(tile.dtype), tile, total, input_precision="ieee")

    all_columns = n0
    if LINEARS > 1:
        all_columns += n1
    if LINEARS > 2:
        all_columns += n2
    if TOKENS == 1:
        total = tl.sum(total, axis=0)[None, :]
    there = (t < tokens)[:, None] & inside_n[None, :]
    at = t[:, None] * all_columns + start + columns[None, :]
    if SPLITS > 1:
        tl.store(partial + split * tokens * all_columns + at, total, mask=there)
        # All threads have written before one of them says so.
        tl.debug_barrier()
        seen = tl.atomic_add(counter + block, 1, sem="acq_rel", scope="gpu")
        if seen == SPLITS - 1:
            total = tl.zeros([TOKENS, BLOCK_N], tl.float32)
            # Past the first-level cache, which may hold what stood there before.
            if TOKENS == 1:
                for other in tl.static_range(SPLITS):
                    total += tl.load(partial + other * all_columns + at, mask=there, other=0.0, cache_modifier=".cg")
            else:
                # Not all at once: sixteen times as many values would not fit into the registers.
                for other in tl.range(0, SPLITS, loop_unroll_factor=2):
                    sums = partial + other * tokens * all_columns + at
                    total += tl.load(sums, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(counter + block, 0)
            _store(y + tokens * start, total, bias, columns, inside_n, there, n, TOKENS, BIASED)
    else:
        _store(y + tokens * start, total, bias, columns, inside_n, there, n, TOKENS, BIASED)


@triton.jit
def _store(y, total, bias, columns, inside_n, there, n, TOKENS: tl.constexpr, BIASED: tl.constexpr):
    if BIASED:
        total += tl.load(bias + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    t = tl.arange(0, TOKENS)
    tl.store(y + t[:, None] * n + columns[None, :], total.to(y.dtype.element_ty), mask=there)
