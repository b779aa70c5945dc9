"""Reads JSON and dataclasses from untrusted data: unknown, missing and wrongly typed keys are refused by name."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from huggingface_hub.dataclasses import type_validator

from sparsify.errors import SparsifyError, suggest

T = TypeVar("T")


def from_mapping(cls: type[T], data: object, *, where: str, error: type[SparsifyError] = SparsifyError) -> T:
    """Returns cls(**data) once every key is known, present where it has no default, and of its annotated type.

    Integers pass for floats; nothing else is converted. `where` names the place in messages. Raises `error`.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where}: expected a mapping of names to values, found {type(data).__name__}")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key in data:
        if key not in known:
            raise error(f"{where}: unknown key {key!r}; known are {', '.join(known)}.{suggest(str(key), known)}")
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name not in data:
            if field.default is MISSING and field.default_factory is MISSING:
                raise error(f"{where}: the key {name!r} is missing")
            continue
        values[name] = _checked(name, data[name], hints[name], where, error)
    return cls(**values)


def _checked(name: str, value: Any, hint: Any, where: str, error: type[SparsifyError]) -> Any:
    if hint in (float, float | None) and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if hint in (int, float, float | None) and isinstance(value, bool):
        raise error(f"{where}: {name} is {value!r}, a number is expected")
    try:
        type_validator(name, value, hint)
    except TypeError as problem:
        raise error(f"{where}: {problem}") from None
    return value


def read_json(path: Path, *, error: type[SparsifyError] = SparsifyError) -> Any:
    """Returns what a JSON file holds. Raises `error` for a file that cannot be read, or is not JSON in UTF-8."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise error(f"{path} cannot be read: its values are nested too deeply") from None
    # ValueError: no UTF-8, no JSON, or a number of thousands of digits.
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}") from None
