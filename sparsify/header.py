"""The header of a safetensors file, read as strictly as it is written: names, dtypes, shapes and where the bytes lie.

The library that reads the tensors takes headers of 100 MB, keys that stand twice and keys that it does not know; here a
header that `save_file` would not have written is refused before the library sees it. Only the header is read.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.strict import JSON_BYTES, parse_json

# Bits of an element: what torch has, without the formats of less than a byte.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16", "F64")
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 1024
_METADATA = "__metadata__"
_ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its name there, dtype as safetensors calls it, shape, and its bytes [begin, end)."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name, in the order of its header.

    Raises CheckpointError for a header of more than 8 MiB or that is not JSON, for an entry with unknown keys, a dtype
    that is none or a shape that does not fit its bytes, and where the tensors are not the whole rest of the file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or not a regular file: the checkpoint is incomplete")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= size - 8:
                raise _unreadable(path, f"its header is said to have {length:,} bytes, the file has {size:,}")
            if length > JSON_BYTES:
                raise _unreadable(path, f"its header has {length:,} bytes, allowed are {JSON_BYTES:,}")
            header = parse_json(file.read(length).decode("utf-8"), JSON_BYTES)
    except RecursionError:
        raise _unreadable(path, "its header is nested too deeply") from None
    except CheckpointError:
        raise
    except (OSError, ValueError) as problem:
        raise _unreadable(path, f"its header is not JSON: {problem}") from None
    return _tensors(path, header, 8 + length, size)


def _tensors(path: Path, header: Any, data: int, size: int) -> dict[str, StoredTensor]:
    if not isinstance(header, dict):
        raise _unreadable(path, f"its header is a {type(header).__name__}")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _unreadable(path, "its metadata are not texts by name")
    # transformers itself reads the format, and no other.
    if metadata.get("format") not in (None, "pt"):
        raise _unreadable(path, f"its metadata say the format {metadata['format']!r}, 'pt' is read")
    tensors = sorted(
        (_tensor(path, name, entry, data) for name, entry in header.items()), key=lambda t: (t.begin, t.end)
    )
    end = data
    for tensor in tensors:
        if tensor.begin != end:
            raise _unreadable(
                path, f"{tensor.name!r} begins at byte {tensor.begin:,}, not {end:,}, where the last ended"
            )
        end = tensor.end
    if end != size:
        raise _unreadable(path, f"its tensors end at byte {end:,}, the file has {size:,}")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    if not re.fullmatch(r"[\x21-\x7e]+", name) or len(name) > _LONGEST_NAME:
        raise _unreadable(path, f"{name[:80]!r} is not a tensor's name")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        found = ", ".join(map(repr, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise _unreadable(path, f"{name!r} has {found}, not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _unreadable(path, f"{name!r} has the dtype {dtype!r}, known are {', '.join(_BITS)}")
    if not _sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _unreadable(path, f"{name!r} has a shape that is not a list of up to {_MOST_DIMENSIONS} sizes")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _unreadable(path, f"{name!r} has offsets that are not two positions")
    # Python's integers do not overflow.
    count = math.prod(shape) * _BITS[dtype] // 8
    given = offsets[1] - offsets[0]
    if given != count:
        raise _unreadable(path, f"{name!r} {shape} {dtype} has {count:,} bytes, its offsets hold {given:,}")
    return StoredTensor(path, name, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _unreadable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a readable safetensors file ({why}): it may be truncated, download or convert again"
    )
