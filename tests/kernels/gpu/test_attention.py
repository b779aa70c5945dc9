"""One decode step of attention against torch: head sizes, groups, contexts, windows, and what stands in caches."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from sparsify.kernels.gpu.attention import MOST_GROUP, run_attention
from sparsify.kernels.gpu.scratch import Scratch

# Positions at the borders of blocks of 64 and of chunks of 256.
POSITIONS = [0, 1, 63, 64, 255, 256, 257, 600]
EPSILON = 1e-5


@dataclass
class Step:
    """Random inputs of one step. What a cache does not hold yet is NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    cosine: Tensor
    sine: Tensor
    position: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    window: int | None = None

    def run(self, scratch: Scratch) -> Tensor:
        return run_attention(
            self.q, self.k, self.v, self.keys, self.values, self.cosine, self.sine, self.position,
            scaling=self.keys.shape[-1] ** -0.5, window=self.window, scratch=scratch, q_weight=self.q_weight,
            k_weight=self.k_weight, epsilon=EPSILON,
        )  # fmt: skip


def step(
    position: int,
    device: torch.device,
    *,
    batch: int = 1,
    key_heads: int = 1,
    group: int = 1,
    size: int = 16,
    capacity: int = 601,
    dtype: torch.dtype = torch.float32,
    normed: bool = False,
    window: int | None = None,
) -> Step:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    angles = torch.rand(capacity, size // 2) * 2 * math.pi
    made = Step(
        q=random(batch, key_heads * group * size),
        k=random(batch, key_heads * size),
        v=random(batch, key_heads * size),
        keys=random(batch, key_heads, capacity, size),
        values=random(batch, key_heads, capacity, size),
        cosine=angles.cos().repeat(1, 2).to(device, dtype),
        sine=angles.sin().repeat(1, 2).to(device, dtype),
        position=torch.tensor(position, device=device),
        q_weight=random(size) if normed else None,
        k_weight=random(size) if normed else None,
        window=window,
    )
    for cache in (made.keys, made.values):
        cache[:, :, position:] = math.nan
    return made


def expected(s: Step) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, H · D], and both caches afterwards, by transformers' functions in the dtype, and softmax in fp64."""
    batch, key_heads, _, size = s.keys.shape
    now = int(s.position)
    q, k, v = (x.reshape(batch, -1, 1, size) for x in (s.q, s.k, s.v))
    if s.q_weight is not None and s.k_weight is not None:
        q, k = normed(q, s.q_weight), normed(k, s.k_weight)
    q, k = apply_rotary_pos_emb(q, k, s.cosine[None, now : now + 1], s.sine[None, now : now + 1])
    keys, values = s.keys.clone(), s.values.clone()
    keys[:, :, now : now + 1], values[:, :, now : now + 1] = k, v
    oldest = max(0, now + 1 - s.window) if s.window else 0
    seen = slice(oldest, now + 1)
    group = q.shape[1] // key_heads
    wide = (x[:, :, seen].double().repeat_interleave(group, 1) for x in (keys, values))
    return F.scaled_dot_product_attention(q.double(), *wide).view(batch, -1), keys, values


def normed(x: Tensor, weight: Tensor) -> Tensor:
    module = Qwen3RMSNorm(len(weight), EPSILON)
    module.weight.data = weight
    with torch.no_grad():
        return module(x)


def assert_right(s: Step, scratch: Scratch) -> None:
    y, keys, values = expected(s)
    found = s.run(scratch)
    assert found.shape == s.q.shape
    assert found.dtype == s.q.dtype
    half = s.q.dtype != torch.float32
    eps = torch.finfo(s.q.dtype).eps
    # Rotations and norms are rounded to the dtype (the interpreter truncates), which moves each score and weight.
    tolerance = 8 * eps if half else 2e-6
    assert float((found.double() - y).abs().max()) <= tolerance * max(1.0, float(s.values.nan_to_num().abs().max()))
    now = int(s.position)
    # The new key to a few steps, the new value and all else to the bit.
    error = (s.keys[:, :, now].double() - keys[:, :, now].double()).abs()
    size = float(keys[:, :, now].abs().max())
    assert float(error.max()) <= (4 * eps if half else 1e-6) * size
    s.keys[:, :, now] = keys[:, :, now]
    for one, other in ((s.keys, keys), (s.values, values)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("position", POSITIONS)
def test_contexts(position: int, scratch: Scratch, device: torch.device) -> None:
    """Nothing behind the position shows, and nothing but the position is written."""
    assert_right(step(position, device, group=2, size=32, capacity=768), scratch)


@pytest.mark.parametrize("window", [1, 100, 256, 1000])
def test_windows(window: int, scratch: Scratch, device: torch.device) -> None:
    """What a window leaves out is not read: it can be NaN."""
    for position in (0, 63, 256, 600):
        s = step(position, device, size=16, capacity=768, window=window)
        for cache in (s.keys, s.values):
            cache[:, :, : max(0, position + 1 - window)] = math.nan
        assert_right(s, scratch)


@pytest.mark.parametrize("group", [1, 3, 4, 8, MOST_GROUP])
def test_groups(group: int, scratch: Scratch, device: torch.device) -> None:
    assert_right(step(70, device, key_heads=2, group=group, size=32, capacity=128), scratch)


@pytest.mark.parametrize("size", [2, 16, 32, 80, 96, 128, 256])
def test_head_sizes(size: int, scratch: Scratch, device: torch.device) -> None:
    assert_right(step(70, device, key_heads=2, group=2, size=size, capacity=100, dtype=torch.float16), scratch)


@pytest.mark.parametrize("size", [64, 80])
def test_norms_of_heads(size: int, scratch: Scratch, device: torch.device) -> None:
    assert_right(step(70, device, key_heads=2, group=3, size=size, capacity=100, normed=True), scratch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_batches_in_every_dtype(normed: bool, dtype: torch.dtype, scratch: Scratch, device: torch.device) -> None:
    """Two chunks and a window, three sequences of two key heads."""
    made = step(
        300, device, batch=3, key_heads=2, group=4, size=64, capacity=320, dtype=dtype, normed=normed, window=290
    )
    assert_right(made, scratch)


def test_more_chunks_than_are_added_up_at_once(scratch: Scratch, device: torch.device) -> None:
    """17 chunks in use, of 18; the highest scores are in the last one, or in the first."""
    for highest in (slice(16 * 256, None), slice(0, 256)):
        s = step(16 * 256 + 100, device, size=16, capacity=18 * 256)
        s.keys[:, :, highest] *= 10
        assert_right(s, scratch)


def test_the_last_position_of_a_cache(scratch: Scratch, device: torch.device) -> None:
    assert_right(step(99, device, batch=2, key_heads=2, size=16, capacity=100), scratch)


def test_parts_of_wider_rows(scratch: Scratch, device: torch.device) -> None:
    """q, k and v of one merged product, three sequences of it; what is beside them is NaN."""
    s = step(70, device, batch=3, key_heads=2, group=2, size=16, capacity=100)
    parts = [torch.full((3, 5), math.nan, device=device), s.q, s.k, s.v]
    _, s.q, s.k, s.v = torch.cat(parts, 1).split([part.shape[1] for part in parts], 1)
    assert_right(s, scratch)


@pytest.mark.parametrize("large", [30.0, 1000.0])
def test_scores_far_from_zero(large: float, scratch: Scratch, device: torch.device) -> None:
    """Whose exponential overflows: the largest of a chunk, and of all chunks, is taken off first."""
    s = step(300, device, group=2, size=16, capacity=320)
    s.q *= large
    y, _, _ = expected(s)
    # Scores are sums of fp32 products near 100 · large.
    torch.testing.assert_close(s.run(scratch).double(), y, rtol=0, atol=2e-6 * large)


def test_steps_in_a_row_fill_the_cache(scratch: Scratch, device: torch.device) -> None:
    """Each step reads what the ones before it wrote; the position alone changes."""
    s = step(0, device, key_heads=2, group=2, size=16, capacity=40)
    for position in range(5):
        s.position.fill_(position)
        for x in (s.q, s.k, s.v):
            x.copy_(torch.randn(x.shape))
        assert_right(s, scratch)
    assert s.keys[:, :, :5].isfinite().all()
    assert s.keys[:, :, 5:].isnan().all()


@pytest.mark.gpu
def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    scratch = Scratch(device)
    s = step(4000, device, key_heads=8, group=4, size=128, capacity=4096, dtype=torch.bfloat16)
    results = [s.run(scratch) for _ in range(50)]
    assert all(torch.equal(results[0], other) for other in results)
    assert not scratch._ring.any()


@pytest.mark.gpu
def test_in_a_graph_the_position_moves_on(device: torch.device) -> None:
    """A launch for the longest context, captured once, is right for each."""
    scratch = Scratch(device)
    s = step(0, device, key_heads=2, group=2, size=64, capacity=600, dtype=torch.float16)
    s.run(scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = s.run(scratch)
    for position in (0, 1, 255, 256, 599):
        s.position.fill_(position)
        for cache in (s.keys, s.values):
            cache.copy_(torch.randn(cache.shape))
        y, _, _ = expected(s)
        graph.replay()
        assert float((found.double() - y).abs().max()) <= 0.03, position
    assert not scratch._ring.any()
