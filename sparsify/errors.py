"""The errors that a user can cause: one class a kind, each with the exit code that the command line returns."""

import difflib
from collections.abc import Iterable


class SparsifyError(ValueError):
    """Bad input: the message names the bad value, what is allowed, and the next step."""

    exit_code = 2


class CheckpointError(SparsifyError):
    """A checkpoint that is missing something, was changed, or is not one of ours; its message is made one_line."""

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UnavailableError(SparsifyError):
    """The machine, not the input: no hub, no room on the disk, a package that is not installed."""

    exit_code = 4


class InterruptedConversionError(SparsifyError):
    """Ctrl-C where what was done is kept: the message says how to go on."""

    exit_code = 130


def one_line(text: str, most: int = 800) -> str:
    """Returns text that quotes a file as one short line: cut in the middle, what is not printable escaped."""
    half = most // 2
    cut = text if len(text) <= most else f"{text[:half]} … {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def suggest(value: str, allowed: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest allowed value, or "" where none is near."""
    near = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
