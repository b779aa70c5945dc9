"""Files that are whole at any moment."""

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes and syncs a file beside its place and renames it: a kill or a power cut leaves the old file or the new."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
    ) as staged:
        try:
            staged.write(text)
            staged.flush()
            os.fsync(staged.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(staged.name, 0o666 & ~umask)
            os.replace(staged.name, path)
            sync(path.absolute().parent)
        except BaseException:
            Path(staged.name).unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Waits until a file, or which files a folder has, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
