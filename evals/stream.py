"""How fast this machine reads memory in one stream: what a product of weights cannot beat.

The native library reads a buffer of more than four times the last-level cache with the threads that the kernels use;
without it, or on another device, torch copies, and a copy counts the bytes it reads and those it writes.
"""

import statistics
import time
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify.errors import UnavailableError
from sparsify.evals.machine import cache_of
from sparsify.kernels import large_pages, library

# At least, and where the system does not tell its cache.
_LEAST_BYTES = 1 << 28
_TIMES_THE_CACHE = 4
_PASSES = 5


class Stream:
    """A buffer in memory and the time that one pass through it takes."""

    def __init__(self, device: torch.device) -> None:
        size = max(_TIMES_THE_CACHE * (cache_of(device) or 0), _LEAST_BYTES)
        self._native = library.load() if device.type == "cpu" else None
        # Written, so that it is memory of its own: untouched pages are all the same page of zeros. In large pages, as
        # the weights are: it is the limit of the machine, not of its address translation.
        self._buffer = large_pages.empty((size,), torch.uint8).fill_(1).to(device)
        self._target: Tensor | None = None if self._native is not None else torch.ones_like(self._buffer)

    @property
    def kind(self) -> Literal["read", "copy"]:
        return "copy" if self._target is not None else "read"

    @property
    def size(self) -> int:
        """Bytes that one pass moves."""
        return len(self._buffer) * (2 if self._target is not None else 1)

    def seconds(self) -> float:
        """Returns the time of one pass. What was in the caches is not there afterwards."""
        if self._target is not None and self._target.is_cuda:
            return self._seconds_by_events(self._target)
        wait(self._buffer.device)
        started = time.perf_counter()
        if self._target is not None:
            self._target.copy_(self._buffer)
        elif self._native is not None:
            self._native.sp_read(self._buffer.data_ptr(), len(self._buffer), torch.get_num_threads())
        wait(self._buffer.device)
        return time.perf_counter() - started

    def _seconds_by_events(self, target: Tensor) -> float:
        before, after = events(2)
        before.record()
        target.copy_(self._buffer)
        after.record()
        torch.cuda.synchronize(target.device)
        return 1e-3 * float(before.elapsed_time(after))

    def gb_per_second(self) -> list[float]:
        """Returns the median of some passes, as the one value of a round."""
        return [self.size / statistics.median(self.seconds() for _ in range(_PASSES)) / 1e9]


def events(number: int) -> list[Any]:
    """Returns CUDA events that tell the time."""
    make: Any = torch.cuda.Event
    return [make(enable_timing=True) for _ in range(number)]


def wait(device: torch.device) -> None:
    """Waits for what the device still computes."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def require_native() -> None:
    """Raises UnavailableError where the native library is missing: some measurements are of nothing else."""
    problem = library.missing()
    if problem is not None:
        raise UnavailableError(problem)
