"""The manifest of a checkpoint: name, size and SHA-256 of every other file in the folder."""

import hashlib
import json
import os
from pathlib import Path

from sparsify.errors import CheckpointError, UnavailableError
from sparsify.strict import JSON_BYTES, read_json

MANIFEST = "sparsify_manifest.json"
CARD = "README.md"


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
    data = read_json(path, error=CheckpointError, most=4 * JSON_BYTES)
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


def checkpoint_sha256(folder: Path) -> str | None:
    """Returns what identifies a checkpoint in results: the SHA-256 of its manifest's entries; None without a manifest.

    The model card is left out: results are written into it, and they stay those of the same model.
    Raises CheckpointError where the manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    files = read_json(path, error=CheckpointError, most=4 * JSON_BYTES)
    entries = files.get("files") if isinstance(files, dict) else None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} cannot be read: it names no files")
    kept = {name: entry for name, entry in entries.items() if name != CARD}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def replace_card(folder: Path, text: str) -> Path:
    """Writes the model card anew and its entry in the manifest; returns the card's path.

    All other entries stay, so a file that was changed is still found. Both files appear by renames, one after the
    other: a kill between the two leaves a card that `check_manifest` calls changed, until this is run again.
    Raises CheckpointError where there is no manifest, UnavailableError where the folder cannot be written.
    """
    if checkpoint_sha256(folder) is None:
        raise CheckpointError(f"{folder} has no {MANIFEST}: `sparsify convert` did not write it, or not to its end")
    manifest = read_json(folder / MANIFEST, error=CheckpointError, most=4 * JSON_BYTES)
    data = text.encode()
    manifest["files"][CARD] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    contents = {CARD: data, MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()}
    # Hidden, and with the folder's own ending for what is not finished: renamed, or removed, and never left behind.
    staged = {name: folder / f".{name}.partial" for name in contents}
    try:
        for name, path in staged.items():
            path.write_bytes(contents[name])
        for name, path in staged.items():
            os.replace(path, folder / name)
    except OSError as problem:
        raise UnavailableError(f"{folder} cannot be written: {problem.strerror}; the card may be unfinished") from None
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
    return folder / CARD


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
