"""The memory of tensors that transformers maps from safetensors files, given back when they were copied elsewhere.

A file's mapping stays as long as one tensor of it is used, and with it every page that was ever read: without this, a
model whose weights are laid out anew while it is loaded holds them twice.
"""

from bisect import bisect_right
from pathlib import Path

from torch import Tensor

from sparsify.kernels import library

_MAPS = Path("/proc/self/maps")
_SUFFIX = ".safetensors"


class MappedWeights:
    """The private mappings of safetensors files in this process, as they are now; none where /proc is not Linux's."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if not _MAPS.is_file():
            return
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[1].endswith("p") and fields[5].endswith(_SUFFIX):
                begin, _, end = fields[0].partition("-")
                self._ranges.append((int(begin, 16), int(end, 16)))
        self._ranges.sort()

    def holds(self, tensor: Tensor) -> bool:
        """Whether all of the tensor's memory is one file's."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        index = bisect_right(self._ranges, (begin, 1 << 64)) - 1
        return index >= 0 and self._ranges[index][0] <= begin and end <= self._ranges[index][1]

    def forget(self, tensor: Tensor) -> None:
        """Gives back the tensor's memory if a file has it: it is read again where somebody still uses it.

        For tensors that were not written to since they were loaded: that would be lost.
        """
        native = library.load()
        if native is not None and self.holds(tensor):
            native.sp_forget_mapped(tensor.data_ptr(), tensor.nbytes)
