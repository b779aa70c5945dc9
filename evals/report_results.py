"""What a report is made of: a checkpoint's own files and the JSON that other commands saved about it.

Each result is recognised by its content and checked to be about this checkpoint: results of the sparse model hold the
checkpoint's hash, results of the dense model (`measure`, `compare`, `sweep`) the hash of its weights. Nothing is
measured here. Where neither the checkpoint (it was rotated) nor the place it was made from holds the dense weights,
results of the dense model are matched by its name alone, and the report says so.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sparsify.checkpoint import LEDGER, SETTINGS, load, read_config, read_ledger
from sparsify.config import SparsifyConfig
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.fingerprint import weights_sha256
from sparsify.ledger import Ledger
from sparsify.manifest import MANIFEST, checkpoint_sha256
from sparsify.models import load_dense, resolve_model
from sparsify.strict import read_json, read_yaml

# The command that saves each kind, and the key that results of the sparse model and of the dense one are checked by.
COMMANDS = {
    "perplexity": "sparsify eval {0} --save eval.json",
    "tasks": "sparsify eval {0} --tasks hellaswag,piqa --save tasks.json",
    "speed": "sparsify bench {0} --save bench.json",
    "crossover": "sparsify bench {0} --crossover --save crossover.json",
    "activations": "sparsify inspect {0} --activations stdlib:evaluation --save activations.json",
    "ppl-p": "sparsify measure {1} --ppl-p 0.1%,1%,5% --save measure.json",
    "comparison": "sparsify compare {1} --methods teal,wina,auto --sparsity 0.4,0.5 --out compare.json",
    "sweep": "sparsify sweep {1} --method {2} --out sweep",
}
FRONTIER = "frontier.json"


@dataclass(frozen=True)
class Stored:
    """One result: the file it stands in, its kind (a key of COMMANDS) and the part that is about this checkpoint."""

    path: Path
    kind: str
    data: dict[str, Any]

    @contextlib.contextmanager
    def reading(self) -> Iterator[dict[str, Any]]:
        """Gives the data; what is missing in it or not what it should be is one SparsifyError that names the file."""
        try:
            yield self.data
        except SparsifyError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as problem:
            raise SparsifyError(
                f"{self.path} is not a whole result of `{COMMANDS[self.kind].partition(' {')[0]}` "
                f"({type(problem).__name__}: {problem}): run the command again"
            ) from problem


@dataclass(frozen=True)
class Subject:
    """The checkpoint: its folder, configuration, ledger, sparsify.yaml and hash, and where it was made from."""

    folder: Path
    config: SparsifyConfig
    ledger: Ledger
    settings: dict[str, Any]
    sha256: str | None
    architecture: dict[str, Any]

    @property
    def source(self) -> str:
        """The dense model as it was named to `convert`; the checkpoint's folder where that is not recorded."""
        return str(self.settings.get("model") or self.folder)

    def command(self, kind: str) -> str:
        """Returns the command whose result is of this kind."""
        return COMMANDS[kind].format(self.folder, self.source, self.config.method)


@dataclass
class Results:
    """All stored results, by kind, in the order given; notes: what a reader has to know about how they were matched."""

    by_kind: dict[str, list[Stored]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Stored]:
        return self.by_kind.get(kind, [])


def read_subject(folder: Path) -> Subject:
    """Returns a checkpoint's own facts. Raises CheckpointError where the folder is not a sound checkpoint."""
    config, ledger = read_config(folder), read_ledger(folder)
    if {linear.name for linear in ledger.linears} != set(config.linears):
        raise CheckpointError(f"{folder / LEDGER}: its linears are not those of config.json")
    architecture = {k: v for k, v in read_json(folder / "config.json").items() if k != "quantization_config"}
    return Subject(folder, config, ledger, _settings(folder), checkpoint_sha256(folder), architecture)


def read_results(subject: Subject, paths: list[Path]) -> Results:
    """Reads the files, or folders of `sparsify sweep`.

    Raises SparsifyError for a file that is none of these results, or one of another model.
    """
    results = Results()
    identity = _DenseIdentity(subject)
    for path in paths:
        file = path / FRONTIER if path.is_dir() else path
        data = read_json(file)
        kind = _kind(file, data)
        stored = Stored(file, kind, data)
        with stored.reading():
            own = _own(stored, subject, identity)
        if kind == "activations" and results.of(kind):
            raise SparsifyError(f"{file}: activations are in {results.of(kind)[0].path} already; give one of the two")
        results.by_kind.setdefault(kind, []).append(own)
    results.notes = list(identity.notes)
    return results


def _kind(path: Path, data: Any) -> str:
    keys = set(data) if isinstance(data, Mapping) else set()
    if {"models", "protocol"} <= keys:
        entries = data["models"] if isinstance(data["models"], list) else []
        if entries and all(isinstance(entry, Mapping) for entry in entries):
            return "tasks" if "scores" in entries[0] else "perplexity"
    marks = {
        "activations": {"activations"},
        "speed": {"sides", "ratios"},
        "crossover": {"cells", "linear"},
        "comparison": {"cells", "schema_version"},
        "ppl-p": {"metric", "scope", "points"},
        "sweep": {"points", "knee"},
    }
    for kind, wanted in marks.items():
        if wanted <= keys:
            return kind
    raise SparsifyError(
        f"--results {path} is not a result that a report can show: it takes what `sparsify eval`, `measure`, `bench` "
        "and `inspect --activations` write with --save, and what `compare` and `sweep` write with --out"
    )


def _own(stored: Stored, subject: Subject, identity: "_DenseIdentity") -> Stored:
    """Returns the result with only what is about this checkpoint. Raises SparsifyError where nothing is."""
    data, path = stored.data, stored.path
    if stored.kind in ("perplexity", "tasks"):
        own = [entry for entry in data["models"] if entry.get("checkpoint_sha256") == subject.sha256 is not None]
        if not own:
            raise _other(path, subject, ", ".join(str(entry.get("model")) for entry in data["models"]))
        return Stored(path, stored.kind, data | {"models": own})
    if stored.kind in ("speed", "crossover", "activations"):
        if data.get("checkpoint_sha256") != subject.sha256 or subject.sha256 is None:
            raise _other(path, subject, str(data.get("model") or data.get("shape")))
        return stored
    if stored.kind == "comparison":
        cells = [cell for cell in data["cells"] if identity.same(cell["key"], cell["key"]["dtype"])]
        if not cells:
            raise _other(path, subject, ", ".join(dict.fromkeys(str(c["key"]["model"]) for c in data["cells"])))
        return Stored(path, stored.kind, data | {"cells": cells})
    dtype = data["settings"]["dtype"] if stored.kind == "ppl-p" else "auto"
    if not identity.same(data, dtype):
        raise _other(path, subject, str(data["model"]))
    return stored


def _other(path: Path, subject: Subject, found: str) -> SparsifyError:
    return SparsifyError(
        f"--results {path} is about {found or 'nothing'}, not about {subject.folder} as it is now (the hashes in them "
        "differ, or the file is too old to hold one): leave it out, or run its command again on this checkpoint"
    )


class _DenseIdentity:
    """Whether results are of the dense model that the checkpoint was made from."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._hash = cache(self._weights)
        self.notes: dict[str, None] = {}

    def same(self, about: Mapping[str, Any], dtype: str) -> bool:
        """about: a mapping with "model" and "model_sha256"; dtype: what the model was loaded as."""
        expected = self._hash(dtype)
        if expected is not None:
            return bool(about.get("model_sha256") == expected)
        name, own = _name(str(about["model"])), _name(self._subject.source)
        if name == own:
            self.notes[
                f"Results of the dense model {own} are matched by its name: its weights are not here (the checkpoint's "
                "are rotated), so their hash could not be compared."
            ] = None
        return name == own

    def _weights(self, dtype: str) -> str | None:
        """Returns the hash of the dense weights, from the checkpoint or its source; None where neither is here."""
        if not self._subject.config.rotated:
            return weights_sha256(load(self._subject.folder, dtype=dtype, device="cpu", dense=True))
        source = self._subject.settings.get("model")
        try:
            here = source is not None and Path(resolve_model(source)).is_dir()
        except SparsifyError:
            here = False
        return weights_sha256(load_dense(str(source), dtype=dtype, device="cpu")) if here else None


def _name(spec: str) -> str:
    return Path(spec).name


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {SETTINGS}: see `sparsify verify {folder}`, which reads {MANIFEST}")
    data = read_yaml(path, error=CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no settings")
    return data
