"""One decode step of attention over a static cache: rotation, append, softmax over the context, in one launch.

    q = rot(norm(q)), k = rot(norm(k)) at the position;   cache[position] = k, v;   y_h = Σ_s softmax_s(σ q_h · k_s) v_s

The position is read on the device. A program takes one sequence, one key head with the query heads that share it, and
CHUNK positions; programs past the position leave at once. The one that holds the position rotates the new key and
writes it first. The last program of a head adds the chunks up in order: two runs give the same bits. Sliding windows
leave chunks out. Rounded where transformers rounds: after the norm, after each product of the rotation.
Covered: head sizes that are even, up to 16 query heads for a key head, one new token a sequence, all sequences at the
same position. Not covered: padding, ALiBi, soft caps, rotations of a part of the head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.gpu.launch import launch
from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.gpu.site import INTERPRETED

MOST_GROUP = 16
# Positions of a program, and of one of its turns.
_CHUNK, _BLOCK = 256, 64


@triton.jit
def decode_attention(
    q,  # [B, H, D]; q, k and v may be parts of wider rows
    k,  # [B, KH, D]
    v,  # [B, KH, D]
    keys,  # cache [B, KH, S, D]
    values,  # cache [B, KH, S, D]
    cosine,  # [S, D]
    sine,  # [S, D]
    q_weight,  # [D], where NORMED
    k_weight,  # [D], where NORMED
    position,  # [] int64
    y,  # [B, H, D]
    partial,  # [B, KH, CHUNKS, GROUP, D + 4] fp32: sums, the maximum, the sum of weights, two unused
    counter,  # [B, KH] int32, zero before and after
    q_stride,
    k_stride,
    v_stride,
    key_heads,
    capacity,
    scaling,
    epsilon,
    NORMED: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SIZE: tl.constexpr,  # D
    HALF_PADDED: tl.constexpr,  # D / 2 to a power of two, at least 16
    SIZE_PADDED: tl.constexpr,
    WIDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    now = tl.load(position).to(tl.int32)
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(now + 1 - WINDOW, 0)
    first_chunk = oldest // CHUNK
    last_chunk = now // CHUNK
    if (chunk >= first_chunk) & (chunk <= last_chunk):
        half: tl.constexpr = SIZE // 2
        sequence = head // key_heads
        own = head % key_heads
        d = tl.arange(0, HALF_PADDED)
        inside_d = d < half
        e = tl.arange(0, SIZE_PADDED)
        inside_e = e < SIZE
        g = tl.arange(0, GROUP_PADDED)
        inside_g = g < GROUP
        cache = head.to(tl.int64) * capacity * SIZE
        cos_low, cos_high, sin_low, sin_high = _angles(cosine, sine, now, d, inside_d, SIZE)
        if chunk == last_chunk:
            at = k + sequence * k_stride + own * SIZE + d[None, :]
            low, high = _turned(
                tl.load(at, mask=inside_d[None, :], other=0.0), tl.load(at + half, mask=inside_d[None, :], other=0.0),
                cos_low, cos_high, sin_low, sin_high, k_weight, d, inside_d, epsilon, NORMED, SIZE,
            )  # fmt: skip
            new = keys + cache + now * SIZE + d[None, :]
            tl.store(new, low, mask=inside_d[None, :])
            tl.store(new + half, high, mask=inside_d[None, :])
            fresh = tl.load(v + sequence * v_stride + own * SIZE + e, mask=inside_e, other=0.0)
            tl.store(values + cache + now * SIZE + e, fresh, mask=inside_e)
            # The loop below reads them back from memory, by other threads.
            tl.debug_barrier()
        at = q + sequence * q_stride + (own * GROUP + g)[:, None] * SIZE + d[None, :]
        there = inside_g[:, None] & inside_d[None, :]
        low, high = _turned(
            tl.load(at, mask=there, other=0.0), tl.load(at + half, mask=there, other=0.0),
            cos_low, cos_high, sin_low, sin_high, q_weight, d, inside_d, epsilon, NORMED, SIZE,
        )  # fmt: skip
        if WIDEN:
            low, high = low.to(tl.float32), high.to(tl.float32)

        most = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        weight = tl.zeros([GROUP_PADDED], tl.float32)
        total = tl.zeros([GROUP_PADDED, SIZE_PADDED], tl.float32)
        begin = tl.maximum(chunk * CHUNK, oldest // BLOCK * BLOCK)
        end = tl.minimum(chunk * CHUNK + CHUNK, now + 1)
        for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
            s = start + tl.arange(0, BLOCK)
            inside_s = (s >= oldest) & (s < end)
            key_at = keys + cache + d[:, None] + s[None, :] * SIZE
            key_there = inside_d[:, None] & inside_s[None, :]
            key_low = tl.load(key_at, mask=key_there, other=0.0)
            key_high = tl.load(key_at + half, mask=key_there, other=0.0)
            value = tl.load(
                values + cache + s[:, None] * SIZE + e[None, :], mask=inside_s[:, None] & inside_e[None, :], other=0.0
            )
            if WIDEN:
                key_low, key_high, value = key_low.to(tl.float32), key_high.to(tl.float32), value.to(tl.float32)
            score = tl.dot(low, key_low, input_precision="ieee")
            score = tl.dot(high, key_high, score, input_precision="ieee") * scaling
            score = tl.where(inside_s[None, :], score, float("-inf"))
            higher = tl.maximum(most, tl.max(score, axis=1))
            p = tl.exp(score - higher[:, None])
            fade = tl.exp(most - higher)
            weight = weight * fade + tl.sum(p, axis=1)
            total = tl.dot(p.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
            most = higher

        row: tl.constexpr = SIZE + 4
        mine = partial + (head * CHUNKS + chunk) * GROUP * row + g * row
        tl.store(mine[:, None] + e[None, :], total, mask=inside_g[:, None] & inside_e[None, :])
        tl.store(mine + SIZE, most, mask=inside_g)
        tl.store(mine + SIZE + 1, weight, mask=inside_g)
        tl.debug_barrier()
        seen = tl.atomic_add(counter + head, 1, sem="acq_rel", scope="gpu")
        if seen == last_chunk - first_chunk:
            tl.store(counter + head, 0)
            for member in tl.static_range(GROUP):
                _add_up(
                    partial + head * CHUNKS * GROUP * row + member * row, y + (head * GROUP + member) * SIZE,
                    first_chunk, last_chunk, GROUP * row, e, inside_e, SIZE, SIZE_PADDED,
                )  # fmt: skip


@triton.jit
def _angles(cosine, sine, now, d, inside_d, SIZE: tl.constexpr):
    half: tl.constexpr = SIZE // 2
    at = now * SIZE + d
    return (
        tl.load(cosine + at, mask=inside_d, other=0.0).to(tl.float32)[None, :],
        tl.load(cosine + at + half, mask=inside_d, other=0.0).to(tl.float32)[None, :],
        tl.load(sine + at, mask=inside_d, other=0.0).to(tl.float32)[None, :],
        tl.load(sine + at + half, mask=inside_d, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit
def _turned(
    low, high, cos_low, cos_high, sin_low, sin_high, weight, d, inside_d, epsilon,
    NORMED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Both halves of heads [N, D / 2], normalised where NORMED, rotated, in their own dtype."""
    a, b = low.to(tl.float32), high.to(tl.float32)
    if NORMED:
        half: tl.constexpr = SIZE // 2
        inverse = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / SIZE + epsilon)[:, None]
        first = tl.load(weight + d, mask=inside_d, other=0.0).to(tl.float32)[None, :]
        second = tl.load(weight + half + d, mask=inside_d, other=0.0).to(tl.float32)[None, :]
        a = ((a * inverse).to(low.dtype).to(tl.float32) * first).to(low.dtype).to(tl.float32)
        b = ((b * inverse).to(low.dtype).to(tl.float32) * second).to(low.dtype).to(tl.float32)
    first = (a * cos_low).to(low.dtype).to(tl.float32) - (b * sin_low).to(low.dtype).to(tl.float32)
    second = (b * cos_high).to(low.dtype).to(tl.float32) + (a * sin_high).to(low.dtype).to(tl.float32)
    return first.to(low.dtype), second.to(low.dtype)


@triton.jit
def _add_up(partial, y, first_chunk, last_chunk, stride, e, inside_e, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr):
    """y [D] of one query head from its chunks, sixteen at a time."""
    c = tl.arange(0, 16)
    most = float("-inf")
    weight = 0.0
    total = tl.zeros([SIZE_PADDED], tl.float32)
    for start in tl.range(first_chunk, last_chunk + 1, 16):
        inside_c = start + c <= last_chunk
        at = partial + (start + c) * stride
        # Past the first-level cache, which may hold what stood there before.
        part = tl.load(
            at[:, None] + e[None, :], mask=inside_c[:, None] & inside_e[None, :], other=0.0, cache_modifier=".cg"
        )
        part_most = tl.load(at + SIZE, mask=inside_c, other=float("-inf"), cache_modifier=".cg")
        part_weight = tl.load(at + SIZE + 1, mask=inside_c, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(most, tl.max(part_most, axis=0))
        share = tl.exp(part_most - higher)
        fade = tl.exp(most - higher)
        weight = weight * fade + tl.sum(share * part_weight, axis=0)
        total = total * fade + tl.sum(share[:, None] * part, axis=0)
        most = higher
    tl.store(y + e, (total / weight).to(y.dtype.element_ty), mask=inside_e)


def run_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    position: Tensor,
    *,
    scaling: float,
    window: int | None,
    scratch: Scratch,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """Returns y [B, H · D] for q [B, H · D], k and v [B, KH · D], and appends k and v to the caches [B, KH, S, D].

    Rows of q, k and v are in one piece each; they may be parts of wider ones.
    cosine and sine are [S, D] in the dtype of q, position [] int64 is the number of tokens in the cache; window: how
    many positions a token sees, itself among them; q_weight and k_weight [D]: gains of a norm of every head.
    """
    batch, key_heads, capacity, size = keys.shape
    group = q.shape[1] // (key_heads * size)
    chunks = triton.cdiv(capacity, _CHUNK)
    y = scratch.empty(q.numel(), q.dtype).view(q.shape)
    launch(
        decode_attention,
        (batch * key_heads, chunks),
        q, k, v, keys, values, cosine, sine, q_weight, k_weight, position, y,
        scratch.empty(batch * key_heads * chunks * group * (size + 4), torch.float32),
        scratch.counters(batch * key_heads),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        key_heads,
        capacity, scaling, epsilon,
        NORMED=q_weight is not None,
        WINDOW=window or 0,
        GROUP=group,
        GROUP_PADDED=16,
        SIZE=size,
        HALF_PADDED=max(16, triton.next_power_of_2(size // 2)),
        SIZE_PADDED=max(16, triton.next_power_of_2(size)),
        WIDEN=INTERPRETED,
        CHUNK=_CHUNK,
        CHUNKS=chunks,
        BLOCK=_BLOCK,
        STAGES=2,
        num_warps=4,
    )  # fmt: skip
    return y
