"""Files that are whole at any moment."""

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it, so that a kill leaves the old file or the new one."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
    ) as staged:
        try:
            staged.write(text)
            staged.flush()
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(staged.name, 0o666 & ~umask)
            os.replace(staged.name, path)
        except BaseException:
            Path(staged.name).unlink(missing_ok=True)
            raise
