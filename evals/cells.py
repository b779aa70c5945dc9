"""The results file of `sparsify compare`: JSON cells, each written at once, found again by the digest of their key.

Several processes each write a part beside it, which the first of them takes into the file. Not covered: two processes
writing one file.
"""

import glob
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError
from sparsify.whole_file import write_whole

Cell = dict[str, Any]

# 2: divergence from the dense model, drift and the calibration's seed; cells of 1 lack them and are not read.
SCHEMA_VERSION = 2


def read_cells(path: Path) -> list[Cell]:
    """Returns the cells of a results file, none where it does not exist. Raises SparsifyError where it is another's."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            raise SparsifyError(
                f"{path} has schema_version {data['schema_version']!r}, this sparsify writes {SCHEMA_VERSION}: "
                "name another file"
            )
        cells: list[Cell] = data["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, SparsifyError):
            raise
        raise SparsifyError(f"{path} is not a results file of this command ({error}): name another file") from error
    return cells


class CellFile:
    """The cells of one file, in memory and on the disk. Raises SparsifyError for a file that is another's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cells = {digest(cell["key"]): cell for cell in read_cells(path)}

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the order in which they were measured."""
        return list(self._cells.values())

    def find(self, key: dict[str, Any]) -> Cell | None:
        """Returns the cell with this key, None where there is none."""
        return self._cells.get(digest(key))

    def put(self, cell: Cell) -> None:
        """Adds a cell, or replaces the one with its key: a kill leaves the old file or the new one."""
        self._cells[digest(cell["key"])] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, _document(self.cells))


def part_of(path: Path, index: int) -> Path:
    """Returns the file of one process's cells beside the results file."""
    return path.with_name(f"{path.name}.part-{index}")


def take_parts(file: CellFile, order: Sequence[dict[str, Any]]) -> None:
    """Adds the cells of all parts beside the file to it, those of the keys in `order` first, and removes the parts."""
    parts = sorted(file.path.parent.glob(f"{glob.escape(file.path.name)}.part-*"))
    found = {digest(cell["key"]): cell for part in parts for cell in read_cells(part)}
    for key in (*map(digest, order), *list(found)):
        if (cell := found.pop(key, None)) is not None:
            file.put(cell)
    for part in parts:
        part.unlink()


def _document(cells: list[Cell]) -> str:
    """Returns the file's JSON, a line for each cell: a diff shows which are new."""
    lines = ",\n".join(json.dumps(cell, separators=(",", ":"), ensure_ascii=False) for cell in cells)
    return f'{{"schema_version":{SCHEMA_VERSION},"cells":[\n{lines}\n]}}\n'


def digest(key: dict[str, Any]) -> str:
    """Returns what identifies a cell: the SHA-256 of its key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
