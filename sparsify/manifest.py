"""The manifest of a checkpoint: name, size and SHA-256 of every other file in the folder.

It also holds a checksum of every tensor and the values of config.json, so that a change can be named. It proves nothing
against somebody who writes it anew: compare `checkpoint_sha256` with a value that came another way.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify.differences import json_differences, tensor_checksums, tensor_differences
from sparsify.errors import CheckpointError, UnavailableError, one_line
from sparsify.strict import JSON_BYTES, from_mapping, read_json
from sparsify.whole_file import sync

MANIFEST = "sparsify_manifest.json"
CARD = "README.md"
_CONFIG = "config.json"
_WEIGHTS = ".safetensors"
_VERSION = 1
# Tensors and configuration of the largest models.
_MOST_BYTES = 4 * JSON_BYTES


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    """tensors: {file: {tensor: CRC-32}}; config: what config.json holds. Older manifests have neither."""

    version: int
    files: dict[str, Any]
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def write_manifest(folder: Path) -> None:
    """Writes the manifest of the files that are in the folder now."""
    found = _files(folder)
    files = {name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for name, path in found.items()}
    tensors = {name: tensor_checksums(path) for name, path in found.items() if name.endswith(_WEIGHTS)}
    config = read_json(found[_CONFIG], most=JSON_BYTES) if _CONFIG in found else {}
    manifest = {"version": _VERSION, "files": files, "tensors": tensors, "config": config}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def recorded_sha256(folder: Path, name: str) -> str:
    """Returns the SHA-256 that the manifest has of a file."""
    return _read(folder)[1][name].sha256


def check_manifest(folder: Path) -> list[str]:
    """Returns one line for every file that is missing, extra or changed, and for what in it was; empty where none is.

    Raises CheckpointError where the manifest itself is missing, not one, or names files outside of the folder.
    """
    manifest, recorded = _read(folder)
    present = _files(folder)
    problems = [f"{name}: missing" for name in recorded if name not in present]
    problems += [f"{name}: not in the manifest" for name in present if name not in recorded]
    for name, entry in recorded.items():
        if name not in present:
            continue
        size = present[name].stat().st_size
        if size != entry.bytes:
            problems.append(f"{name}: {size} bytes, {entry.bytes} were written")
        elif file_sha256(present[name]) != entry.sha256:
            problems.append(f"{name}: its content was changed (SHA-256 differs)")
        else:
            continue
        if name in manifest.tensors:
            problems += tensor_differences(present[name], manifest.tensors[name])
        elif name == _CONFIG and manifest.config:
            problems += _config_differences(present[name], manifest.config)
    return [one_line(problem) for problem in problems]


def checkpoint_sha256(folder: Path) -> str | None:
    """Returns what identifies a checkpoint in results: the SHA-256 of its manifest's entries; None without a manifest.

    The model card is left out: results are written into it, and they stay those of the same model.
    Raises CheckpointError where the manifest cannot be read.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest, _ = _read(folder)
    kept = {name: entry for name, entry in manifest.files.items() if name != CARD}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def replace_card(folder: Path, text: str) -> Path:
    """Writes the model card anew and its entry in the manifest; returns the card's path.

    All other entries stay, so a file that was changed is still found. Both files appear by renames, one after the
    other: a kill between the two leaves a card that `check_manifest` calls changed, until this is run again.
    Raises CheckpointError where there is no manifest, UnavailableError where the folder cannot be written.
    """
    if checkpoint_sha256(folder) is None:
        raise CheckpointError(f"{folder} has no {MANIFEST}: `sparsify convert` did not write it, or not to its end")
    manifest = read_json(folder / MANIFEST, error=CheckpointError, most=_MOST_BYTES)
    data = text.encode()
    manifest["files"][CARD] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    contents = {CARD: data, MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()}
    # Hidden, and with the folder's own ending for what is not finished: renamed, or removed, and never left behind.
    staged = {name: folder / f".{name}.partial" for name in contents}
    try:
        for name, path in staged.items():
            path.write_bytes(contents[name])
            sync(path)
        for name, path in staged.items():
            os.replace(path, folder / name)
        sync(folder)
    except OSError as problem:
        raise UnavailableError(f"{folder} cannot be written: {problem.strerror}; the card may be unfinished") from None
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
    return folder / CARD


def _read(folder: Path) -> tuple[_Manifest, dict[str, _File]]:
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{folder} has no {MANIFEST}: `sparsify convert` did not write it, or not to its end")
    manifest = from_mapping(
        _Manifest, read_json(path, error=CheckpointError, most=_MOST_BYTES), where=str(path), error=CheckpointError
    )
    if manifest.version != _VERSION:
        raise CheckpointError(f"{path} has version {manifest.version!r}, this sparsify reads {_VERSION}")
    recorded = {}
    for name, entry in manifest.files.items():
        if not _stays_inside(name):
            raise CheckpointError(f"{path} names {name!r}, which is not a file inside its folder: refused")
        recorded[name] = from_mapping(_File, entry, where=f"{path}: {name!r}", error=CheckpointError)
        if recorded[name].bytes < 0 or not re.fullmatch("[0-9a-f]{64}", recorded[name].sha256):
            raise CheckpointError(f"{path}: {name!r} has no size or no SHA-256: {entry!r}")
    return manifest, recorded


def _stays_inside(name: str) -> bool:
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not any(part in ("", ".", "..") for part in parts)


def _config_differences(path: Path, recorded: Mapping[str, Any]) -> list[str]:
    try:
        return json_differences(path.name, read_json(path, error=CheckpointError, most=JSON_BYTES), recorded)
    except CheckpointError as problem:
        return [str(problem)]


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
