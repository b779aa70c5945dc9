"""The dense model's files: tensors read one by one, with a checksum of what was read, and whether files have changed.

A file counts as changed when its size, its time of modification or its header is another one, and a tensor when its
bytes are. Not covered: a byte that is changed in place between two reads of other tensors, with the time put back.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.errors import CheckpointError, SparsifyError
from sparsify.header import StoredTensor
from sparsify.preflight import INDEX, SINGLE, check_index, merges, read_headers, translated
from sparsify.tensor_file import CHUNK, Entry, bytes_of, fill, read_chunks, stored_entry, tensor_entry, torch_dtype


class Source:
    """The safetensors files in a folder, by the names that their tensors have in the model."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Raises SparsifyError for another format, and for tensors that a model makes from several of a file."""
        self.folder = folder
        if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
            raise SparsifyError(
                f"{folder} has no {SINGLE} and no {INDEX}: --stream reads no other format than safetensors"
            )
        if merges(model):
            raise SparsifyError(
                f"--stream does not convert a {type(model).__name__}, whose experts transformers merges while it reads "
                "them: leave --stream out, on a machine that holds the model"
            )
        self._files = check_index(folder)
        self.tensors = _by_module(read_headers(self._files), model)
        self._digests: list[Any] = []
        self.state = self._state()

    def check(self) -> None:
        """Raises SparsifyError where a file is not what it was when this object was made."""
        now = self._state()
        for name, before in self.state.items():
            if now[name] != before:
                what = next(key for key in before if now[name].get(key) != before[key])
                raise SparsifyError(
                    f"the source was changed while it was converted: {self.folder / name} has another {what}; "
                    "remove the unfinished folder and convert again from files that stay as they are"
                )

    @contextmanager
    def hashing(self) -> Iterator[Any]:
        """Yields a SHA-256 of all tensors that are read inside, in the order they are read."""
        digest = hashlib.sha256()
        self._digests.append(digest)
        try:
            yield digest
        finally:
            self._digests.remove(digest)

    def in_order(self, names: list[str]) -> list[str]:
        """Returns the names in the order in which they lie on the disk."""
        return sorted(names, key=lambda name: (self.tensors[name].path, self.tensors[name].begin))

    def read(self, name: str, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a whole tensor, read into memory of its own: no mapping of the file stays."""
        stored = self.tensors[name]
        data = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
        view = bytes_of(data)
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.begin)
            for start in range(0, len(view), CHUNK):
                piece = view[start : start + CHUNK]
                fill(file, piece, stored)
                self._see(piece)
        return data.view(torch_dtype(stored)).reshape(stored.shape).to(device=device, dtype=dtype)

    def rows(self, name: str, rows: list[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns some rows [R, ...] of a tensor, and reads no others."""
        stored = self.tensors[name]
        size = (stored.end - stored.begin) // stored.shape[0]
        data = torch.empty(len(rows), size, dtype=torch.uint8)
        with stored.path.open("rb", buffering=0) as file:
            for index, row in enumerate(rows):
                file.seek(stored.begin + row * size)
                fill(file, bytes_of(data[index]), stored)
        typed = data.view(torch_dtype(stored)).reshape(len(rows), *stored.shape[1:])
        return typed.to(device=device, dtype=dtype)

    def entry(self, name: str, dtype: torch.dtype) -> Entry:
        """Returns what writes a tensor to another file in the given dtype, a piece at a time."""
        stored = self.tensors[name]
        own = torch_dtype(stored)
        if own == dtype:
            return stored_entry(stored, self._see)
        like = tensor_entry(torch.empty(stored.shape, dtype=dtype, device="meta"))

        def chunks() -> Iterator[memoryview]:
            # A piece holds whole elements: CHUNK is a multiple of every element's size.
            for piece in read_chunks(stored):
                self._see(piece)
                yield from tensor_entry(torch.frombuffer(piece, dtype=own).to(dtype)).chunks()

        return Entry(like.dtype, like.shape, like.nbytes, chunks)

    def _see(self, piece: memoryview) -> None:
        for digest in self._digests:
            digest.update(piece)

    def _state(self) -> dict[str, dict[str, Any]]:
        """Returns size, time and SHA-256 of the header of each file, and the SHA-256 of what is small."""
        found: dict[str, dict[str, Any]] = {}
        for path in [*self._files, self.folder / "config.json", self.folder / INDEX]:
            try:
                about = os.stat(path)
                found[path.name] = {"size": about.st_size, "time of modification": about.st_mtime_ns}
                found[path.name]["header" if path in self._files else "content"] = _header_sha256(path)
            except FileNotFoundError:
                found[path.name] = {"size": None}
        return found


def _header_sha256(path: Path) -> str:
    with path.open("rb") as file:
        if path.suffix != ".safetensors":
            return hashlib.file_digest(file, "sha256").hexdigest()
        start = file.read(8)
        return hashlib.sha256(start + file.read(min(int.from_bytes(start, "little"), CHUNK))).hexdigest()


def _by_module(stored: dict[str, StoredTensor], model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Returns the tensors that the model has, by its names: with the prefix of the model without a head, or less it."""
    known = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    found: dict[str, StoredTensor] = {}
    for name, tensor in translated(stored, model).items():
        for spelled in (name, prefix + name, name.removeprefix(prefix)):
            if spelled in known:
                found[spelled] = tensor
                break
    for one, other in model.all_tied_weights_keys.items():
        if one in found or other in found:
            found.setdefault(one, found.get(other) or found[one])
            found.setdefault(other, found[one])
    for name, tensor in found.items():
        if tensor.shape != tuple(known[name].shape):
            raise CheckpointError(f"{name} has the shape {list(tensor.shape)}, {list(known[name].shape)} is expected")
    if missing := [name for name in known if name not in found]:
        raise CheckpointError(f"{model.config.name_or_path} has no weight {missing[0]!r} ({len(missing)} are missing)")
    return found
