"""How fast this machine reads memory in one stream: what a product of weights cannot beat.

The native library reads a buffer of more than four times the last-level cache with the threads that the kernels use;
without it, or on another device, torch copies, and a copy counts the bytes it reads and those it writes.
"""

import statistics
import time
from typing import Literal

import torch
from torch import Tensor

from sparsify.errors import UnavailableError
from sparsify.evals.machine import last_level_cache
from sparsify.kernels import large_pages, library

# Where the system does not tell its cache, and at least: an H200's 50 MB of L2 are exceeded four times as well.
_LEAST_BYTES = 1 << 28
_TIMES_THE_CACHE = 4
_PASSES = 5


class Stream:
    """A buffer in memory and the time that one pass through it takes."""

    def __init__(self, device: torch.device) -> None:
        size = max(_TIMES_THE_CACHE * (last_level_cache() or 0), _LEAST_BYTES)
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
        wait(self._buffer.device)
        started = time.perf_counter()
        if self._target is not None:
            self._target.copy_(self._buffer)
        elif self._native is not None:
            self._native.sp_read(self._buffer.data_ptr(), len(self._buffer), torch.get_num_threads())
        wait(self._buffer.device)
        return time.perf_counter() - started

    def gb_per_second(self) -> list[float]:
        """Returns the median of some passes, as the one value of a round."""
        return [self.size / statistics.median(self.seconds() for _ in range(_PASSES)) / 1e9]


def wait(device: torch.device) -> None:
    """Waits for what the device still computes."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def require_native() -> None:
    """Raises UnavailableError where the native library is missing: some measurements are of nothing else."""
    problem = library.missing()
    if problem is not None:
        raise UnavailableError(problem)
