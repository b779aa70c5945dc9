"""The unfinished folder of a streamed conversion, `.NAME.partial` beside its target: lock, journal, finished parts.

The journal is written whole after each finished part, when all files that it names are synced: a kill at any moment
leaves what the journal says, and perhaps files that it does not name, which are made again. It holds a fingerprint of
all that the result depends on; a conversion goes on only with the same one.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from sparsify.errors import CheckpointError, SparsifyError, UnavailableError
from sparsify.new_folder import check_output
from sparsify.strict import JSON_BYTES, from_mapping, read_json
from sparsify.whole_file import sync, write_whole

_VERSION = 1
_JOURNAL, _LOCK = "journal.json", "lock"


@dataclass(frozen=True)
class Unit:
    """A finished part of the model: its file, what was read of the source for it, and what was chosen in it.

    sha256 is the file's, source_sha256 of the dense tensors it was made from; linears are LinearEntry by name;
    densities are realised ones on the evaluation text, by name.
    """

    file: str
    bytes: int
    sha256: str
    source_sha256: str
    linears: dict[str, Any] = field(default_factory=dict)
    densities: dict[str, float] = field(default_factory=dict)


@dataclass
class Journal:
    """What is finished. carried: records of the hidden states at the boundary after the last unit, by stream.

    complete: everything is written, and only the folder's name is not its own yet; measured: what was measured then.
    """

    fingerprint: dict[str, Any]
    units: list[Unit] = field(default_factory=list)
    carried: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False
    measured: dict[str, Any] | None = None


class Partial:
    """The unfinished folder of `out`, locked by this process while the context is open."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.partial"
        self.units = self.folder / "units"
        self.checkpoint = self.folder / "checkpoint"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Makes the folder where there is none, and locks it. Raises UnavailableError where another process has it."""
        if not self.folder.exists():
            check_output(self.out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as problem:
            raise UnavailableError(f"{self.out.parent} cannot be written: {problem.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 20, 0).decode(errors="replace").strip()
            self._unlock()
            raise UnavailableError(
                f"another process{f' ({holder})' if holder else ''} is converting to {self.out} now: wait for it, or "
                "give another --out"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        return self

    def __exit__(self, *error: object) -> None:
        """Unlocks the folder; one without a journal holds nothing, and goes."""
        if self._lock is not None and not (self.folder / _JOURNAL).exists():
            self._remove()
        self._unlock()

    def begin(self, fingerprint: Mapping[str, Any], *, resume: bool) -> Journal:
        """Returns the journal to go on with, a new one where nothing is finished.

        Raises SparsifyError for an unfinished conversion without `resume`, and for one with another fingerprint.
        """
        found = self._read()
        if found is None:
            if self.out.exists():
                self._remove()
            check_output(self.out)
            self._clear()
            journal = Journal(dict(fingerprint))
            self.write(journal)
            return journal
        if not resume:
            done = max(len(found.units) - 1, 0)
            raise SparsifyError(
                f"{self.folder} holds an unfinished conversion to {self.out} ({done} blocks are done): give --resume "
                "to go on with it, or remove it to start anew"
            )
        _refuse_mixing(self.folder, found.fingerprint, json.loads(json.dumps(fingerprint)))
        if not found.complete or self.checkpoint.exists():
            check_output(self.out)
        return found

    def write(self, journal: Journal) -> None:
        """Writes the journal anew and syncs it."""
        text = json.dumps({"version": _VERSION} | asdict(journal), indent=1) + "\n"
        write_whole(self.folder / _JOURNAL, text)

    def commit(self, journal: Journal) -> None:
        """Writes the journal, and removes the hidden states that it does not name."""
        sync(self.units)
        sync(self.checkpoint)
        self.write(journal)
        named = {record["file"] for record in journal.carried.values()}
        for path in self.units.glob("carried-*"):
            if path.name not in named:
                path.unlink()

    def empty_checkpoint(self, kept: Sequence[Path]) -> None:
        """Removes what an earlier process wrote into the checkpoint after its weights."""
        for path in self.checkpoint.iterdir():
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish(self) -> None:
        """Gives the finished checkpoint its name and removes the rest; does what is left of that after a kill."""
        if self.checkpoint.exists():
            check_output(self.out)
            os.rename(self.checkpoint, self.out)
            sync(self.out.parent)
        self._remove()

    def _remove(self) -> None:
        """Removes the folder, the journal last: what a kill leaves is then still told apart."""
        for path in (self.units, self.checkpoint):
            shutil.rmtree(path, ignore_errors=True)
        (self.folder / _JOURNAL).unlink(missing_ok=True)
        self._unlock()
        shutil.rmtree(self.folder)

    def _read(self) -> Journal | None:
        path = self.folder / _JOURNAL
        if not path.exists():
            return None
        data = read_json(path, error=CheckpointError, most=4 * JSON_BYTES)
        if not isinstance(data, dict) or data.pop("version", None) != _VERSION:
            raise CheckpointError(f"{path} is not a journal of this sparsify: remove {self.folder} to start anew")
        units = data.pop("units", [])
        journal = from_mapping(Journal, data, where=str(path), error=CheckpointError)
        journal.units = [
            from_mapping(Unit, unit, where=f"{path}: units", error=CheckpointError) for unit in units or []
        ]
        return journal

    def _clear(self) -> None:
        """Removes what a kill left before there was a journal."""
        for folder in (self.units, self.checkpoint):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        sync(self.folder)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _refuse_mixing(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differences = []
    for key in [*then, *(key for key in now if key not in then)]:
        if then.get(key) != now.get(key):
            differences.append(f"{key} ({_shown(then.get(key))} then, {_shown(now.get(key))} now)")
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise SparsifyError(
            f"{folder} was begun with other things than now: {', '.join(differences[:4])}{more}. Results would be "
            "mixed: repeat the command as it was, or remove the folder to start anew"
        )


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
