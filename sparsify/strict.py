"""Reads JSON, YAML and dataclasses from untrusted data: unknown, missing and wrongly typed keys are refused by name.

Nothing is read that is no regular file or larger than its kind can be, keys that stand twice are refused, and YAML has
no aliases and no tags of its own: what is read takes memory in proportion to the file.
"""

import json
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from sparsify.errors import SparsifyError, one_line, suggest

T = TypeVar("T")

# What a checkpoint's JSON can have: a configuration of 20,000 linears is smaller.
JSON_BYTES = 8 << 20
# Results hold every document of a task.
_RESULT_BYTES = 1 << 30
_BYTES_OF_VALUE = 40
YAML_BYTES = 256 << 10


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
    # ValueError: Python does not write out a number of thousands of digits.
    except (TypeError, ValueError) as problem:
        raise error(f"{where}: {one_line(str(problem), 300)}") from None
    return value


def read_json(path: Path, *, error: type[SparsifyError] = SparsifyError, most: int = _RESULT_BYTES) -> Any:
    """Returns what a JSON file of at most `most` bytes holds.

    Raises `error` for what is no regular file, is larger, is no JSON in UTF-8, or has a key twice.
    """
    try:
        return parse_json(_read(path, most, error), most)
    except RecursionError:
        raise error(f"{path} cannot be read: its values are nested too deeply") from None
    # ValueError: no UTF-8, no JSON, a key twice, or a number of thousands of digits.
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}") from None


def parse_json(text: str, most: int) -> Any:
    """Returns what a JSON text holds that could have `most` bytes.

    Raises ValueError for no JSON, a key that stands twice or more than a value for every 40 of these bytes (an empty
    list has three, and takes 64 of memory), and RecursionError.
    """
    values = sum(map(text.count, ",[{"))
    if values > most // _BYTES_OF_VALUE:
        raise ValueError(f"it holds some {values:,} values, at most {most // _BYTES_OF_VALUE:,} are read")
    return json.loads(text, object_pairs_hook=_without_doubles)


def read_yaml(path: Path, *, error: type[SparsifyError] = SparsifyError) -> Any:
    """Returns what a YAML file of plain values holds, None for an empty one.

    Raises `error` for what is no regular file, is larger than 256 KiB, is no YAML in UTF-8, or has aliases or tags.
    """
    try:
        return yaml.load(_read(path, YAML_BYTES, error), Loader=_PlainLoader)
    except RecursionError:
        raise error(f"{path} cannot be read: its values are nested too deeply") from None
    except yaml.YAMLError as problem:
        raise error(
            f"{path} cannot be read, not YAML of plain values: {one_line(' '.join(str(problem).split()), 300)}"
        ) from None
    except UnicodeDecodeError as problem:
        raise error(f"{path} cannot be read: it is not UTF-8 text (byte {problem.start})") from None
    # ValueError: a date or a number that is none.
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}") from None


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases, of which a few lines can stand for gigabytes, and without keys that stand twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not read", None)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, times in keys.most_common(1):
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the `name: value` pairs of a YAML file, {} of an empty one.

    Raises SparsifyError where there is no such file, and where it holds something else.
    """
    if not path.is_file():
        reason = "is a directory or no regular file" if path.exists() else "No such file"
        raise SparsifyError(f"cannot read the settings {path}: {reason}; --config takes a YAML file")
    document = read_yaml(path)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SparsifyError(f"the settings {path} are a {type(document).__name__}, not `name: value` lines")
    return document


def _read(path: Path, most: int, error: type[SparsifyError]) -> str:
    # First, because to open a pipe waits for who writes into it.
    if path.exists() and not path.is_file():
        raise error(f"{path} cannot be read: it is not a regular file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise error(f"{path} cannot be read: it has more than {most:,} bytes")
    return data.decode("utf-8")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {doubled!r} stands twice")
    return found
