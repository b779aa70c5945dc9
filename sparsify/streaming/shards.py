"""The weight files of a streamed conversion, each written when its block is done, and what they become at the end."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from sparsify.errors import CheckpointError, UnavailableError
from sparsify.header import read_header
from sparsify.manifest import file_sha256, recorded_sha256
from sparsify.preflight import SINGLE
from sparsify.streaming.partial import Partial, Unit
from sparsify.streaming.source import Source
from sparsify.tensor_file import Entry, FileRecord, in_file_order, stored_entry, tensor_entry, write_tensors
from sparsify.weight_files import layout_of, stored_names, write_index


class Shards:
    """Where the layout has one file for the model, units are files beside the checkpoint, merged when all are there."""

    def __init__(self, model: PreTrainedModel, partial: Partial) -> None:
        self._names = stored_names(model)
        self._partial = partial
        self.layout = layout_of(model, self._names)
        state = model.state_dict()
        self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
        self._bytes = [0] * self.layout.units
        for name in self._names:
            self._bytes[self.layout.unit_of(name)] += state[name].nbytes

    def check_room(self, done: int) -> None:
        """Raises UnavailableError where what is certainly still to be written is more than the disk has free."""
        needed = sum(self._bytes[done:]) + (sum(self._bytes) if self.layout.single else 0)
        free = shutil.disk_usage(self._partial.folder).free
        if needed > free:
            raise UnavailableError(
                f"the disk has {free / 1e9:.2f} GB free at {self._partial.out.parent}, and {needed / 1e9:.2f} GB or "
                "more are still to be written: free some room, or give another --out"
            )

    def path(self, unit: int) -> Path:
        """Returns where a unit is written."""
        if self.layout.single:
            return self._partial.units / f"unit-{unit:05d}.safetensors"
        return self._partial.checkpoint / self.layout.file_of(unit)

    def copy_rest(self, source: Source) -> FileRecord:
        """Writes what is outside of the blocks from the source's files."""
        return write_tensors(self.path(0), self._entries(0, source))

    def write_block(self, index: int, block: nn.Module) -> FileRecord:
        """Writes a converted block from memory."""
        prefix = f"{self.layout.prefix}.{index}."
        state = {prefix + name: tensor for name, tensor in block.state_dict().items()}
        return write_tensors(
            self.path(index + 1), {self._stored(name): tensor_entry(tensor) for name, tensor in state.items()}
        )

    def read_again(self, unit: int, source: Source) -> None:
        """Reads the dense tensors of a unit in the order in which they were read when it was made."""
        entries = self._entries(unit, source)
        by_file_name = {self._names[name]: name for name in self._names}
        order = [by_file_name[name] for name in in_file_order(entries)]
        for name in order if unit == 0 else source.in_order(order):
            for _ in entries[self._names[name]].chunks():
                pass

    def assemble(self, units: Sequence[Unit]) -> None:
        """Makes the checkpoint's weight files of the finished units.

        Raises CheckpointError where a unit is not on the disk as it was written.
        """
        paths = [self.path(index) for index in range(self.layout.units)]
        for path, unit in zip(paths, units, strict=True):
            if not path.is_file() or path.stat().st_size != unit.bytes:
                raise _damaged(path, self._partial.folder)
        tensors = {name: (path, stored) for path in paths for name, stored in read_header(path).items()}
        if not self.layout.single:
            total = sum(stored.end - stored.begin for _, stored in tensors.values())
            write_index(self._partial.checkpoint, {name: path.name for name, (path, _) in tensors.items()}, total)
            return
        for path, unit in zip(paths, units, strict=True):
            if file_sha256(path) != unit.sha256:
                raise _damaged(path, self._partial.folder)
        write_tensors(
            self._partial.checkpoint / SINGLE, {name: stored_entry(stored) for name, (_, stored) in tensors.items()}
        )

    def check_written(self, units: Sequence[Unit]) -> None:
        """Raises CheckpointError where the manifest found other bytes in a file than were written hours ago."""
        for index, unit in enumerate(units) if not self.layout.single else ():
            if recorded_sha256(self._partial.checkpoint, self.path(index).name) != unit.sha256:
                raise _damaged(self.path(index), self._partial.folder)

    def _entries(self, unit: int, source: Source) -> dict[str, Entry]:
        names = [name for name in self._names if self.layout.unit_of(name) == unit]
        return {self._names[name]: source.entry(name, self._dtypes[name]) for name in names}

    def _stored(self, name: str) -> str:
        """Returns a tensor's name in the file; what a sparse layer adds is named as its weight is."""
        if name in self._names:
            return self._names[name]
        layer, _, key = name.rpartition(".")
        return self._names[f"{layer}.weight"].removesuffix("weight") + key


def _damaged(path: Path, folder: Path) -> CheckpointError:
    return CheckpointError(f"{path} is not as it was written: remove {folder} and convert anew, without --resume")
