"""Memory for weights in large pages, where the system gives them to those who ask (Linux, transparent huge pages).

Streaming gigabytes through 4 KiB pages is bound by address translation, in a virtual machine most of all: a read of
1 GB on 2 cores went from 32 to 44 GB/s. transformers maps weights from files, whose pages the system chooses.
"""

import mmap
from math import prod

import torch
from torch import Tensor

_LARGE = 2 << 20
_AVAILABLE = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS")


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns a contiguous CPU tensor, not initialised, in large pages where it fills at least one."""
    size = prod(shape) * dtype.itemsize
    if not _AVAILABLE or size < _LARGE:
        return torch.empty(shape, dtype=dtype)
    # Room to begin on a large page; what lies before it is never touched, so it takes no memory.
    memory = mmap.mmap(-1, size + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=offset).view(shape)


def fills_large_pages(tensor: Tensor) -> bool:
    """Whether the tensor begins on a large page, as those of `empty` do, or is too small for one."""
    return tensor.nbytes < _LARGE or tensor.data_ptr() % _LARGE == 0 or not _AVAILABLE
