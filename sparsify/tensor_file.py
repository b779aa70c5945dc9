"""Safetensors files written tensor by tensor: the very bytes that `save_file` writes, with one tensor in memory.

`save_file` holds a second copy of everything that goes into a file; here tensors may also be copied from other files,
in pieces. Read back by sparsify.header and by the library as any other file.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.header import StoredTensor

# The order of tensors in a file: by dtype, those of larger alignment first, then by name.
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2",
    "I8", "U8", "BOOL",
)  # fmt: skip
_DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F32": torch.float32,
    "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16,
    "I16": torch.int16, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
CHUNK = 16 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor to write: dtype as safetensors calls it, shape, bytes, and what yields the bytes in pieces."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[memoryview]]


@dataclass(frozen=True)
class FileRecord:
    """A file that was written and synced: its size and SHA-256."""

    bytes: int
    sha256: str


def torch_dtype(stored: StoredTensor) -> torch.dtype:
    """Returns the torch dtype of a stored tensor."""
    return _DTYPES[stored.dtype]


def tensor_entry(tensor: Tensor) -> Entry:
    """Returns the entry of a tensor in memory, on any device; it is made contiguous while it is written."""

    def chunks() -> Iterator[memoryview]:
        yield bytes_of(tensor)

    return Entry(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, chunks)


def stored_entry(stored: StoredTensor, see: Callable[[memoryview], None] | None = None) -> Entry:
    """Returns the entry of a tensor that is copied from another file; see is called with each piece that is read."""

    def chunks() -> Iterator[memoryview]:
        for piece in read_chunks(stored):
            if see is not None:
                see(piece)
            yield piece

    return Entry(stored.dtype, stored.shape, stored.end - stored.begin, chunks)


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat: Any = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def read_chunks(stored: StoredTensor, size: int = CHUNK) -> Iterator[memoryview]:
    """Yields the bytes of a stored tensor in pieces of `size`. Raises CheckpointError where the file is shorter now."""
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.begin)
        left = stored.end - stored.begin
        buffer = bytearray(min(size, left))
        while left:
            piece = memoryview(buffer)[: min(size, left)]
            fill(file, piece, stored)
            left -= len(piece)
            yield piece


def fill(file: FileIO, piece: memoryview, stored: StoredTensor) -> None:
    """Reads bytes of a stored tensor from where its file stands until the piece is full."""
    done = 0
    while done < len(piece):
        count = file.readinto(piece[done:])
        if not count:
            raise CheckpointError(f"{stored.path} ends inside {stored.name!r}: it was truncated while it was read")
        done += count


def in_file_order(entries: Mapping[str, Entry]) -> list[str]:
    """Returns the names in the order in which a file holds them."""
    return sorted(entries, key=lambda name: (_ORDER.index(entries[name].dtype), name))


def write_tensors(path: Path, entries: Mapping[str, Entry]) -> FileRecord:
    """Writes and syncs a safetensors file as `save_file(..., metadata={"format": "pt"})` would; returns its record."""
    names = in_file_order(entries)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + entries[name].nbytes
        header[name] = {
            "dtype": entries[name].dtype,
            "shape": list(entries[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 8 + len(text) + end
    with path.open("wb") as file:
        for piece in (struct.pack("<Q", len(text)), text):
            file.write(piece)
            digest.update(piece)
        for name in names:
            for chunk in entries[name].chunks():
                file.write(chunk)
                digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    assert path.stat().st_size == size, f"{path}: an entry yielded more or fewer bytes than it has"
    return FileRecord(size, digest.hexdigest())
