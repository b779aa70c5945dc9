"""What a measurement of single kernels on a GPU needs: cold weights, checked sides, times by events, a device copy.

Weights are rotated: a turn calls a side once for each copy, and what a turn reads exceeds four times the L2 even at the
lowest density of the run. A turn is captured in a CUDA graph, as a decoded token is, and its replays are timed by
events, so that neither Python nor the launches' latency is measured. All sides and a copy within the device's memory
take turns in the same rounds. Nothing is timed whose first result is not near the equation in fp64. Only `GraphTimer`
needs a GPU: with another timer everything runs on a CPU, in Triton's interpreter. Not covered: several devices.
"""

import gc
import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals.interleaving import in_turns, medians
from sparsify.evals.machine import available_memory
from sparsify.evals.stream import events
from sparsify.kernels.reference import keep_mask, sparse_linear
from sparsify.kernels.spec import SparseTensors

ACTIVATION = "silu"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Of the output's norm: one rounding of it is 1.1e-3 in bf16, a channel that is lost among 4096 is 1e-2.
TOLERANCES = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 3e-5}
_TIMES_THE_CACHE = 4
# At a density of 5% the smallest site of a 1B model needs 500.
_MOST_COPIES = 512
_COPY_BYTES = 1 << 28
# The part of the free memory that copies of one layout may take: there is a second layout, and work memory.
_SHARE_OF_MEMORY = 0.3
# Calls in a graph, so that what lies between two graphs is under a percent of it.
_LEAST_CALLS = 64
_REPLAYS = 3
# A device that had nothing to do, while a kernel was compiled, needs some milliseconds to raise its clocks.
_WARM_SECONDS = 0.03
_COPY = "copy within the device's memory"

Call = Callable[[int], Any]
Turn = Callable[[], list[float]]


class Timer(Protocol):
    """Makes a turn of call(0) to call(copies − 1), repeated until there are `calls` of them.

    The turn returns seconds a call, one value for each time that it was measured.
    """

    def __call__(self, call: Call, copies: int, *, calls: int = _LEAST_CALLS) -> Turn: ...


@dataclass(frozen=True)
class Site:
    """An input site: linears [N_l, inputs] of these outputs; gated: its input is act(gate) · up."""

    name: str
    inputs: int
    outputs: tuple[int, ...]
    gated: bool = False

    def nbytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of its weights."""
        return self.inputs * sum(self.outputs) * dtype.itemsize


@dataclass(frozen=True)
class Side:
    """What is timed. call(i) uses copy i and returns [T, N], one or a list; expected: the right result of call(0) in
    fp64, None for torch's own products; tolerance: the error that is allowed, relative, by norm.
    """

    call: Call
    expected: Sequence[Tensor] | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Timed:
    """Seconds a call by side and round, the copy's GB/s by round, and why a side has no times."""

    seconds: dict[str, list[list[float]]]
    copy: list[float]
    problems: dict[str, str]


class GraphTimer:
    """Times calls on one GPU: a turn is a CUDA graph, its replays are timed by events, back to back.

    Raises UnavailableError where `require_gpu` does.
    """

    def __init__(self, device: torch.device, *, replays: int = _REPLAYS) -> None:
        require_gpu(device)
        self.device, self._replays = device, replays
        with torch.cuda.device(device):
            # One for all: cuBLAS keeps work memory for every stream that it has seen.
            self._side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def __call__(self, call: Call, copies: int, *, calls: int = _LEAST_CALLS) -> Turn:
        passes = math.ceil(calls / copies)
        with torch.cuda.device(self.device):
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                # Compiles and loads the kernels, and lets cuBLAS take its memory: none of it may happen in a capture.
                for index in range(copies):
                    call(index)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._side):
                for _ in range(passes):
                    for index in range(copies):
                        call(index)
            ready = time.perf_counter() + _WARM_SECONDS
            while time.perf_counter() < ready:
                graph.replay()
                torch.cuda.synchronize()
        # The graph points into tensors that only the call holds.
        return lambda: self._seconds(graph, passes * copies, call)

    def _seconds(self, graph: torch.cuda.CUDAGraph, calls: int, call: Call) -> list[float]:
        marks = events(self._replays + 1)
        with torch.cuda.device(self.device):
            # While it runs, the others are queued: the device never waits for the host.
            graph.replay()
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
            torch.cuda.synchronize()
        return [1e-3 * float(before.elapsed_time(after)) / calls for before, after in pairwise(marks)]


class DeviceCopy:
    """A copy within the memory of a device: the bandwidth that kernels are compared with.

    size: bytes that a call moves, read and written; more than four times a cache of `cache` bytes each.
    """

    def __init__(self, device: torch.device, *, cache: int, least: int = _COPY_BYTES) -> None:
        length = max(_TIMES_THE_CACHE * cache + 1, least)
        self._source = torch.ones(length, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)
        self.size = 2 * length

    def __call__(self, index: int) -> None:
        self._target.copy_(self._source)


class SiteCopies:
    """Random weights of one site, several times, with an input for each copy.

    weights[i][l] is [N_l, K], channel-contiguous, normal with the standard deviation K^-½. x[i] and, for a gated site,
    up[i] are [T, K]: normal, or rows of `recorded` [n, K] (gated: [n, 2, K], gate and up) from the first on. h[i]
    [T, K] is what the weights are multiplied with. Raises SparsifyError for recorded inputs of another shape.
    """

    def __init__(
        self,
        site: Site,
        dtype: torch.dtype,
        tokens: int,
        device: torch.device,
        number: int,
        *,
        recorded: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        self.site, self.dtype, self.tokens, self.device = site, dtype, tokens, device
        self._random = torch.Generator(device).manual_seed(seed)
        std = site.inputs**-0.5
        self.weights = [[self._normal(site.inputs, n, std=std).t() for n in site.outputs] for _ in range(number)]
        drawn = self._inputs(number, recorded)
        self.x = [part[:, 0].contiguous() for part in drawn]
        self.up = [part[:, 1].contiguous() for part in drawn] if site.gated else [None] * number
        self.h = [x if up is None else gated(x, up) for x, up in zip(self.x, self.up, strict=True)]

    def __len__(self) -> int:
        return len(self.weights)

    def rows(self) -> list[Tensor]:
        """Returns the weights of each copy merged, [ΣN, K] row-major: what torch's dense product reads fastest."""
        return [torch.cat(weights).contiguous() for weights in self.weights]

    def thresholds(self, sparsity: float, scale: Tensor | None = None) -> list[Tensor]:
        """Returns for each copy the threshold [] under which that share of its own inputs' scores lies."""
        if sparsity <= 0:
            return [torch.full((), -1.0, device=self.device) for _ in self.h]
        scores = [h.float().abs() if scale is None else h.float().abs() * scale for h in self.h]
        return [score.flatten().quantile(sparsity) for score in scores]

    def tensors(self, sparsity: float, *, rank: int = 0, scaled: bool = False) -> list[list[SparseTensors]]:
        """Returns the tensors of the linears, by copy; with `rank`, random low-rank rows of their own for each copy."""
        scale = None
        if scaled:
            scale = torch.rand(self.site.inputs, generator=self._random, device=self.device) + 0.5
        found = []
        for weights, threshold in zip(self.weights, self.thresholds(sparsity, scale), strict=True):
            plain = [SparseTensors(w, None, threshold, scale, density=1.0 - sparsity) for w in weights]
            found.append([self._ranked(t, rank) if rank else t for t in plain])
        return found

    def kept(self, site: Sequence[Sequence[SparseTensors]]) -> float:
        """Returns the share of channels that some token keeps, over all copies and linears."""
        shares = [
            keep_mask(h, t.threshold, t.scale).any(0).float().mean()
            for h, linears in zip(self.h, site, strict=True)
            for t in linears
        ]
        return float(torch.stack(shares).mean())

    def expected(self, site: Sequence[SparseTensors]) -> list[Tensor]:
        """Returns the outputs [T, N_l] of copy 0 by the equation, in fp64 on the device."""
        return [exact(self.h[0], t) for t in site]

    def _normal(self, *shape: int, std: float = 1.0) -> Tensor:
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return empty.normal_(0.0, std, generator=self._random)

    def _ranked(self, t: SparseTensors, rank: int) -> SparseTensors:
        outputs, inputs = t.weight.shape
        rows = self._normal(rank, outputs, std=rank**-0.5)
        return replace(t, lr_a=self._normal(rank, inputs, std=inputs**-0.5), lr_b=rows.t())

    def _inputs(self, number: int, recorded: Tensor | None) -> list[Tensor]:
        """Returns [T, 1 or 2, K] for each copy."""
        parts = 2 if self.site.gated else 1
        if recorded is None:
            return [self._normal(self.tokens, parts, self.site.inputs) for _ in range(number)]
        rows = recorded.to(self.device, self.dtype)
        rows = rows[:, None] if rows.dim() == 2 else rows
        if rows.dim() != 3 or tuple(rows.shape[1:]) != (parts, self.site.inputs) or not len(rows):
            shape = "[n, 2, " if self.site.gated else "[n, "
            raise SparsifyError(
                f"the recorded inputs of {self.site.name} are {list(recorded.shape)}, "
                f"they must be {shape}{self.site.inputs}]"
            )
        rows = rows.repeat(math.ceil(number * self.tokens / len(rows)), 1, 1)
        return [rows[index * self.tokens : (index + 1) * self.tokens] for index in range(number)]


def require_gpu(device: torch.device) -> None:
    """Raises UnavailableError, with the reason, where Triton's kernels cannot be timed on the device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UnavailableError(f"Triton's kernels are timed on a GPU, and there is none here (device: {device})")
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError("Triton is not installed, so there are no GPU kernels to time: pip install triton")
    from sparsify.kernels.gpu.site import INTERPRETED

    if INTERPRETED:
        raise UnavailableError("TRITON_INTERPRET is set: Triton would interpret its kernels on the CPU; unset it")


def copies_on(device: torch.device, size: int, density: float, *, cache: int) -> int:
    """Returns number_of_copies for weights of `size` bytes and the lowest density of a run, with what is free now."""
    if device.type == "cuda":
        # What is left of earlier measurements is free as well.
        gc.collect()
        torch.cuda.empty_cache()
    return number_of_copies(size, density, cache=cache, free=available_memory(device))


def number_of_copies(size: int, density: float, *, cache: int, free: int | None) -> int:
    """Returns how many copies of `size` bytes, of which a call reads the share `density`, exceed four times the cache.

    At least 2, at most 512, and no more than a part of the free memory holds. Raises UnavailableError where it does
    not hold two.
    """
    wanted = math.floor(_TIMES_THE_CACHE * cache / max(density * size, 1.0)) + 1
    room = _MOST_COPIES if free is None else int(_SHARE_OF_MEMORY * free / size)
    if room < 2:
        raise UnavailableError(
            f"{free or 0:,} bytes of memory are free, too few for two copies of weights of {size:,} bytes and for work"
        )
    return min(max(wanted, 2), _MOST_COPIES, room)


def exact(x: Tensor, t: SparseTensors) -> Tensor:
    """Returns y [T, N] of one linear for x [T, K] by the equation, in fp64."""
    wide = replace(
        t,
        weight=t.weight.double(),
        bias=None if t.bias is None else t.bias.double(),
        lr_a=None if t.lr_a is None else t.lr_a.double(),
        lr_b=None if t.lr_b is None else t.lr_b.double(),
    )
    return sparse_linear(x.double(), wide)


def error_of(found: Any, expected: Sequence[Tensor]) -> float:
    """Returns the largest relative error, by norm, of the outputs, one tensor or a list; NaN where one is NaN."""
    outputs = list(found) if isinstance(found, list | tuple) else [found]
    errors = [
        float((y.double().view_as(right) - right).norm() / right.norm().clamp_min(1e-30))
        for y, right in zip(outputs, expected, strict=True)
    ]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) · up as the kernels compute it: a threshold must meet the same numbers in the reference."""
    from sparsify.kernels.gpu.gate import run_gate
    from sparsify.kernels.gpu.scratch import scratch_of
    from sparsify.kernels.gpu.site import on_device

    with on_device(gate.device):
        return run_gate(gate, up, ACTIVATION, scratch=scratch_of(gate.device))


@torch.no_grad()
def timed(sides: Mapping[str, Side], copies: int, timer: Timer, copy: DeviceCopy, rounds: int) -> Timed:
    """Checks every side, makes its turn, and measures all that are right, with the copy, in interleaved rounds.

    A side that is wrong, or that raises, is left out: its problem is a line.
    """
    turns: dict[str, Turn] = {}
    problems: dict[str, str] = {}
    for name, side in sides.items():
        try:
            problem = _problem(side)
            if problem is None:
                turns[name] = timer(side.call, copies)
            else:
                problems[name] = problem
        # A kernel can fail in any way, and the table names it.
        except Exception as raised:  # noqa: BLE001
            problems[name] = line_of(raised)
    turns[_COPY] = timer(copy, 1, calls=4)
    seconds = in_turns(turns, rounds)
    rates = [copy.size / median / 1e9 for median in medians(seconds.pop(_COPY))]
    return Timed(seconds, rates, problems)


def line_of(raised: BaseException) -> str:
    """Returns an exception as one line that is not too long for a table."""
    return f"{type(raised).__name__}: {' '.join(str(raised).split())}"[:300]


def _problem(side: Side) -> str | None:
    if side.expected is None:
        return None
    error = error_of(side.call(0), side.expected)
    return None if error <= side.tolerance else f"wrong by {error:.1e}, where {side.tolerance:.0e} is allowed"
