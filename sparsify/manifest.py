"""The manifest of a checkpoint: name, size and SHA-256 of every other file in the folder."""

import hashlib
import json
from pathlib import Path

from sparsify.errors import CheckpointError
from sparsify.strict import read_json

MANIFEST = "sparsify_manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the manifest of the files that are in the folder now."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(folder)
    }
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> list[str]:
    """Returns one line for every file that is missing, extra or changed; empty where all is as it was written.

    Raises CheckpointError where the manifest itself is missing or not one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: `sparsify convert` did not write it, or not to its end")
    data = read_json(path, error=CheckpointError)
    try:
        recorded = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in data["files"].items()}
        version = data["version"]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as problem:
        raise CheckpointError(f"{path} cannot be read ({type(problem).__name__}: {problem})") from None
    if version != 1:
        raise CheckpointError(f"{path} has version {version!r}, this sparsify reads 1")
    present = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
    problems = [f"{name}: missing" for name in recorded if name not in present]
    problems += [f"{name}: not in the manifest" for name in present if name not in recorded]
    for name, (size, digest) in recorded.items():
        if name in present and present[name].stat().st_size != size:
            problems.append(f"{name}: {present[name].stat().st_size} bytes, {size} were written")
        elif name in present and _sha256(present[name]) != digest:
            problems.append(f"{name}: its content was changed (SHA-256 differs)")
    return problems


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
