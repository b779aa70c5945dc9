"""Times of single products with weights that come from memory and not from a cache, sides in turns.

Before each turn a buffer of several times the last-level cache is read, which empties it and is the measurement of the
machine's stream at that moment; in a turn every copy of the weights is used once. Without that, the active rows of one
matrix at 75% sparsity or more stay in the cache, and a kernel seems faster than memory.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.evals.interleaving import Progress, in_turns, medians
from sparsify.evals.machine import CpuWait, last_level_cache
from sparsify.evals.stream import Stream
from sparsify.kernels.layout import channel_contiguous

_TIMES_THE_CACHE = 4
# Enough of small ones, which would need thousands: the read before a turn has emptied the cache.
_MOST_COPIES = 64
# torch's threads look for work for some milliseconds after a product before they sleep.
_REST_SECONDS = 0.005

Call = Callable[[int], object]


@dataclass(frozen=True)
class Copies:
    """The same matrix [O, I] several times, row-major and channel-contiguous; large ones fill the cache four times."""

    rows: list[Tensor]
    channels: list[Tensor]

    @classmethod
    def of(cls, weight: Tensor) -> "Copies":
        """Returns copies of the weight, in any strides, two at least of each layout."""
        weight = weight.detach()
        wanted = math.ceil(_TIMES_THE_CACHE * (last_level_cache() or 0) / weight.nbytes)
        number = min(max(wanted, 2), _MOST_COPIES)
        rows = [weight.clone(memory_format=torch.contiguous_format) for _ in range(number)]
        return cls(rows, [channel_contiguous(copy) for copy in rows])


@dataclass(frozen=True)
class Cold:
    """Seconds of each side's calls by round, the stream's GB/s in each round, and the share of `CpuWait` over them."""

    seconds: dict[str, list[list[float]]]
    stream: list[float]
    waited_for_cpu: float | None


def cold_turns(
    calls: Mapping[str, Call], copies: int, stream: Stream, rounds: int, progress: Progress | None = None
) -> Cold:
    """Times call(i) for each copy i, for every side in every round, after one round that is not measured."""
    reads: list[float] = []

    def turn(call: Call) -> Callable[[], list[float]]:
        def measure() -> list[float]:
            time.sleep(_REST_SECONDS)
            reads.append(stream.seconds())
            return [_seconds(call, index) for index in range(copies)]

        return measure

    sides = {name: turn(call) for name, call in calls.items()}
    with torch.inference_mode():
        in_turns(sides, 1)
        reads.clear()
        with CpuWait() as wait:
            seconds = in_turns(sides, rounds, progress)
    by_round = [reads[first : first + len(sides)] for first in range(0, len(reads), len(sides))]
    return Cold(seconds, [stream.size / median / 1e9 for median in medians(by_round)], wait.share)


def torch_calls(x: Sequence[Tensor], rows: Sequence[Tensor]) -> dict[str, Call]:
    """Returns torch's dense product of x[i] [T, I] with rows[i] [O, I], with oneDNN (its default) and without.

    Which of the two is faster depends on the processor and the dtype, by a factor of two.
    """

    def plain(index: int) -> Tensor:
        return F.linear(x[index], rows[index])

    def without(index: int) -> Tensor:
        with _without_onednn():
            return F.linear(x[index], rows[index])

    return {"torch": plain, "torch, oneDNN off": without}


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Inside, torch's products do not go to oneDNN."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.enabled
    # Not mkldnn.flags: that sets every flag it has, and warns of one for GPUs.
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _seconds(call: Call, index: int) -> float:
    started = time.perf_counter()
    call(index)
    return time.perf_counter() - started
