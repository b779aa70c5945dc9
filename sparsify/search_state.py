"""The state file of a search: written whole after each generation, and read again only by the very same search."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.strict import from_mapping, read_json
from sparsify.whole_file import write_whole

SCHEMA_VERSION = 1


@dataclass
class SearchState:
    """Where an evolutionary search stands after a generation.

    fingerprint: all that the result depends on; best: genes [linears, 3] of now; population: genes [individuals,
    linears of the group, 3], the best first; fitness: theirs; history: a line for each generation.
    """

    fingerprint: dict[str, Any]
    best: list[Any]
    group: int = 0
    generation: int = -1
    population: list[Any] = field(default_factory=list)
    fitness: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def check_state_file(path: Path) -> None:
    """Raises SparsifyError where no file can be written at path, before hours of work."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise SparsifyError(f"the state file {path} {reason}: give the path of a file in an existing folder")


def read_state(path: Path, fingerprint: Mapping[str, Any]) -> SearchState | None:
    """Returns the state in a file, None where there is no file yet.

    Raises SparsifyError for a file that is not one, or one of a search with another fingerprint: it names what differs.
    """
    if not path.exists():
        return None
    data = read_json(path)
    version = data.pop("schema_version", None) if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise SparsifyError(
            f"{path} is not a state file of this search (schema_version {version!r}): name another file"
        )
    state = from_mapping(SearchState, data, where=str(path))
    differs = [name for name, value in fingerprint.items() if state.fingerprint.get(name) != value]
    if differs:
        raise SparsifyError(
            f"{path} is the state of another search: {', '.join(differs)} differ; name another file, or delete it"
        )
    return state


def write_state(path: Path, state: SearchState) -> None:
    """Writes the file anew beside itself and renames it: a kill leaves the old or the new one."""
    try:
        write_whole(path, json.dumps({"schema_version": SCHEMA_VERSION} | asdict(state)) + "\n")
    except OSError as problem:
        raise UnavailableError(f"the state file {path} cannot be written: {problem.strerror}") from None
