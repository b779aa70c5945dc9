"""What a command says: one result, as tables for people or as one JSON document for programs.

Results go to stdout. Logs, progress and errors go to stderr, also those of libraries that print: a pipe reads only
the result.
"""

import contextlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsify.errors import SparsifyError
from sparsify.launch import launched_index
from sparsify.whole_file import write_whole


class Format(StrEnum):
    """How a result is printed."""

    human = "human"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="Tables for people, or one JSON document on stdout.")]
SaveOption = Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Also write the JSON to this file.")]


@dataclass(frozen=True)
class Output:
    """Where the result of one command goes."""

    format: Format = Format.human
    save: Path | None = None

    def __post_init__(self) -> None:
        # Before the work, not after it: hours of it must not end at a folder that is not there.
        if self.save is not None and (self.save.is_dir() or not self.save.absolute().parent.is_dir()):
            reason = "is a folder" if self.save.is_dir() else "is in a folder that does not exist"
            raise SparsifyError(f"--save {self.save} {reason}; give the path of a file in an existing folder")

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Sends what libraries print to stderr while a command works."""
        with contextlib.redirect_stdout(sys.stderr):
            yield

    def emit(self, result: Mapping[str, Any], render: Callable[[Console], None]) -> None:
        """Writes the result: the file of --save, and stdout as JSON or by render; of several processes the first's."""
        if launched_index() > 0:
            return
        text = json.dumps(result, indent=2, default=_jsonable, ensure_ascii=False, allow_nan=True)
        if self.save is not None:
            write_whole(self.save, text + "\n")
        if self.format is Format.json:
            sys.stdout.write(text + "\n")
        else:
            render(Console(file=sys.stdout, highlight=False))


def visible(text: str) -> str:
    """Returns text with pictures for control characters but line ends and tabs: they could drive the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else chr(0x2400 + ord(c) % 32) for c in text)


def print_error(message: str) -> None:
    """Prints one line on stderr, `error: ...`, red on a terminal."""
    process = launched_index()
    start = f"error in process {process}: " if process else "error: "
    line = Text(start, style="bold red").append(visible(" ".join(message.split())), style="red")
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def make_table(title: str, *columns: str, left: int = 1) -> Table:
    """Returns a table with its first `left` columns left-aligned and the rest, numbers, right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        if index < left:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def percent(value: float | None, digits: int = 1) -> str:
    """Returns 0.5 as "50.0%", None as "-"."""
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def byte_count(value: float | None) -> str:
    """Returns a number of bytes in decimal units and three digits, "11.5 MB"; None as "-"."""
    if value is None:
        return "-"
    if value < 999.5:
        return f"{value:.0f} B"
    power = 1
    while value >= 999.5 * 1000**power and power < 4:
        power += 1
    value, unit = value / 1000**power, ("kB", "MB", "GB", "TB")[power - 1]
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def common_prefix(names: Sequence[str]) -> str:
    """Returns the leading parts that all dotted names share, with their dots: tables leave it out of every row."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared]) if parts else ""


def seconds(value: float) -> str:
    """Returns a duration in words short enough for a log line: "4.2 s", "3 min 05 s", "2 h 10 min"."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _jsonable(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} in a result is not JSON")
