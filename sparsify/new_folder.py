"""Folders that appear whole: written and synced beside their place, put there by one rename."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.whole_file import sync

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(out: Path) -> None:
    """Raises SparsifyError where the output folder exists already."""
    if out.exists() or out.is_symlink():
        raise SparsifyError(f"{out} exists already: give another --out, or remove it first; nothing was written")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `out`, which becomes `out` at the end, with the permissions of the umask.

    A kill leaves no half folder under that name. Raises SparsifyError for an `out` that exists, UnavailableError where
    it cannot be written or the disk is full.
    """
    check_output(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as problem:
        raise UnavailableError(f"{out.parent} cannot be written: {problem.strerror}") from None
    try:
        yield staging
        settle(staging)
        os.rename(staging, out)
        sync(out.parent)
    except (OSError, SafetensorError) as problem:
        raise _write_error(out, problem) from problem
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def settle(folder: Path) -> None:
    """Gives everything in a folder the permissions of the umask, and syncs it."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in sorted(folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        sync(path)
    sync(folder)


def is_disk_full(problem: Exception) -> bool:
    """Whether a write failed for want of room; the writer of weights has words for it, and no number."""
    number = getattr(problem, "errno", None)
    return number in _DISK_FULL or "No space left" in str(problem) or "File too large" in str(problem)


def _write_error(out: Path, problem: Exception) -> SparsifyError:
    if is_disk_full(problem):
        return UnavailableError(f"the disk is full: {out} was not written; free some room, or give another --out")
    return UnavailableError(f"{out} could not be written: {problem}")
