"""What of a changed file is different: tensors by a checksum each, JSON by its keys.

The SHA-256 of the whole file says that it was changed; what is here only says where.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

from sparsify.errors import CheckpointError, one_line
from sparsify.header import read_header

_CHUNK = 1 << 20


def tensor_checksums(path: Path) -> dict[str, str]:
    """Returns the CRC-32 of every tensor of a safetensors file: of its dtype, its shape and its bytes.

    Raises CheckpointError for a file that is none.
    """
    checksums = {}
    with path.open("rb") as file:
        for name, tensor in read_header(path).items():
            value = crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
            file.seek(tensor.begin)
            for start in range(tensor.begin, tensor.end, _CHUNK):
                value = crc32(file.read(min(_CHUNK, tensor.end - start)), value)
            checksums[name] = f"{value:08x}"
    return checksums


def tensor_differences(path: Path, recorded: Mapping[str, Any]) -> list[str]:
    """Returns one line for every tensor of a file that is missing, extra or not as the recorded checksums say."""
    try:
        found = tensor_checksums(path)
    except (CheckpointError, OSError) as problem:
        return [str(problem)]
    lines = [f"{path.name}: the tensor {name!r} is missing" for name in recorded if name not in found]
    lines += [f"{path.name}: the tensor {name!r} was added" for name in found if name not in recorded]
    lines += [
        f"{path.name}: the tensor {name!r} was changed (CRC-32 differs)"
        for name, value in found.items()
        if name in recorded and recorded[name] != value
    ]
    return lines or [f"{path.name}: none of its tensors was changed"]


def json_differences(name: str, found: Any, expected: Any) -> list[str]:
    """Returns one line for every value of the JSON file `name` that is missing, extra or not the expected one."""
    return [one_line(f"{name}: {line}") for line in _differences("", found, expected)]


def _differences(place: str, found: Any, expected: Any) -> Iterator[str]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in [*expected, *(key for key in found if key not in expected)]:
            path = f"{place}.{key}" if place else str(key)
            if key not in found:
                yield f"{path} is missing, it should be {_shown(expected[key])}"
            elif key not in expected:
                yield f"{path} was added: {_shown(found[key])}"
            else:
                yield from _differences(path, found[key], expected[key])
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from _differences(f"{place}[{index}]", one, other)
    # NaN is not equal to itself, and 1 is to true: their texts are compared.
    elif repr(found) != repr(expected):
        yield f"{place} is {_shown(found)}, it should be {_shown(expected)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
