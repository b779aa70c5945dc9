"""The hidden states between two blocks, window by window, in one file: none of them is kept in memory.

The file is read and written at places, not mapped: a mapping would count as memory of this process.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.manifest import file_sha256
from sparsify.tensor_file import bytes_of


@dataclass(frozen=True)
class CarriedRecord:
    """A finished file: its name, what it holds, its size and SHA-256. width is D of the hidden states [B, S, D]."""

    file: str
    dtype: str
    width: int
    bytes: int
    sha256: str


class States(Protocol):
    """What gives hidden states by the tokens that they are of."""

    def load(self, batch: Tensor, device: torch.device) -> Tensor: ...


class Carried:
    """Hidden states [B, S, D] of batches of tokens [B, S], found again by the tokens themselves."""

    def __init__(self, path: Path, batches: Sequence[Tensor], record: CarriedRecord | None = None) -> None:
        """Makes a new file, or opens the one that a record says; read-only then."""
        self.path = path
        self._places: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        start = 0
        for batch in batches:
            key = _key(batch)
            if key not in self._places:
                self._places[key] = start, tuple(batch.shape)
                start += batch.numel()
        self._tokens, self._written = start, set[bytes]()
        self.dtype = None if record is None else getattr(torch, record.dtype)
        self.width = 0 if record is None else record.width
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if record is None else os.O_RDONLY, 0o666)

    def close(self) -> None:
        os.close(self._handle)

    @property
    def complete(self) -> bool:
        """Whether every batch was stored."""
        return len(self._written) == len(self._places)

    def store(self, batch: Tensor, hidden: Tensor) -> None:
        """Writes the hidden states [B, S, D] of a batch of tokens [B, S]; those that were stored already are kept."""
        key = _key(batch)
        start, shape = self._places[key]
        if key in self._written:
            return
        if self.dtype is None:
            self.dtype, self.width = hidden.dtype, hidden.shape[-1]
        assert (hidden.dtype, tuple(hidden.shape)) == (self.dtype, (*shape, self.width))
        _write_all(self._handle, bytes_of(hidden), start * self.width * self.dtype.itemsize)
        self._written.add(key)

    def load(self, batch: Tensor, device: torch.device) -> Tensor:
        """Returns the hidden states [B, S, D] of a batch of tokens [B, S]."""
        assert self.dtype is not None
        start, shape = self._places[_key(batch)]
        size = self.width * self.dtype.itemsize
        data = torch.empty(batch.numel() * size, dtype=torch.uint8)
        _read_all(self._handle, bytes_of(data), start * size, self.path)
        return data.view(self.dtype).reshape(*shape, self.width).to(device)

    def seal(self) -> CarriedRecord:
        """Syncs the finished file and returns its record."""
        assert self.complete
        assert self.dtype is not None
        os.fsync(self._handle)
        dtype = str(self.dtype).removeprefix("torch.")
        size = self._tokens * self.width * self.dtype.itemsize
        return CarriedRecord(self.path.name, dtype, self.width, size, file_sha256(self.path))


def reopen(folder: Path, record: CarriedRecord, batches: Sequence[Tensor]) -> Carried:
    """Opens the file of a record. Raises CheckpointError where it is not as it was written."""
    path = folder / record.file
    if not path.is_file() or path.stat().st_size != record.bytes or file_sha256(path) != record.sha256:
        raise CheckpointError(f"{path} is not as it was written: remove {folder} and convert anew, without --resume")
    return Carried(path, batches, record)


def _key(batch: Tensor) -> bytes:
    return repr(tuple(batch.shape)).encode() + batch.detach().cpu().contiguous().numpy().tobytes()


def _write_all(handle: int, data: memoryview, place: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], place + done)


def _read_all(handle: int, data: memoryview, place: int, path: Path) -> None:
    done = 0
    while done < len(data):
        count = os.preadv(handle, [data[done:]], place + done)
        if not count:
            raise CheckpointError(f"{path} is shorter than it was written: convert anew, without --resume")
        done += count
