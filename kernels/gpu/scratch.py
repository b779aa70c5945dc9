"""Work memory of the kernels: partial sums and lists from torch's allocator, counters from a ring of zeros.

torch.empty follows the stream and belongs to a CUDA graph that is being captured, so both are safe with it. Counters
must be zero before a launch and are zero after it: a ring of them is made once, and launches take turns in it.
"""

from functools import cache

import torch
from torch import Tensor

from sparsify.errors import SparsifyError

_RING = 1 << 18


class Scratch:
    """Work memory on one device. Launches of one Scratch must not overlap by more than its ring is long."""

    def __init__(self, device: torch.device, size: int = _RING) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise SparsifyError(
                "run the model once before capturing it: its kernels' counters are made in the first run"
            )
        self.device = device
        self._ring = torch.zeros(size, dtype=torch.int32, device=device)
        self._next = 0

    def counters(self, number: int) -> Tensor:
        """Returns int32 zeros [number], which a launch leaves zero. Raises SparsifyError for more than there are."""
        if number > len(self._ring):
            raise SparsifyError(
                f"a launch needs {number} counters, there are {len(self._ring)}: its outputs are too many"
            )
        if self._next + number > len(self._ring):
            self._next = 0
        taken = self._ring[self._next : self._next + number]
        # The next ones begin at 16 bytes again: Triton compiles a kernel anew for a pointer that does not.
        self._next += -(-number // 4) * 4
        return taken

    def empty(self, number: int, dtype: torch.dtype) -> Tensor:
        """Returns memory for `number` values."""
        return torch.empty(number, dtype=dtype, device=self.device)


@cache
def scratch_of(device: torch.device) -> Scratch:
    """Returns the one that plain calls on a device share."""
    return Scratch(device)
