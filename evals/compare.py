"""Methods × sparsities × models under one protocol, resumable: `python -m sparsify.evals.compare --help`.

Every finished cell is written at once; a run that is started again with the same file skips what it holds. A cell is
identified by everything that its number depends on: weights, texts, calibration, windows, method, protocol, version.
Not covered: speed, accuracy tasks, and two processes writing one file.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import sparsify
from sparsify.allocation import Allocation, get_allocation
from sparsify.calibration import Calibration
from sparsify.conversion import convert
from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals.comparison_table import render
from sparsify.evals.perplexity import perplexity
from sparsify.evals.realised import RealisedDensity
from sparsify.ledger import ledger_of
from sparsify.methods import Method, get_method
from sparsify.models import load_dense, load_tokenizer
from sparsify.text import Windows, read_text, windows

METHODS = ("teal", "wina", "rsparse:rho=auto", "rsparse:rho=0.95", "rsparse:rho=0.9", "rsparse:rho=1.0")
SPARSITIES = (0.25, 0.4, 0.5, 0.6, 0.7)
DENSE = "dense"
SCHEMA_VERSION = 1

_log = logging.getLogger("sparsify.evals.compare")


@dataclass(frozen=True)
class Subject:
    """A model and its two texts, as specs (sparsify.models, sparsify.text)."""

    model: str
    calibration: str
    evaluation: str

    @property
    def name(self) -> str:
        """The model's name without the folders of one machine."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model


@dataclass(frozen=True)
class Settings:
    """How texts become windows, the same for all cells of a run. limit: evaluation windows at most."""

    seq_len: int = 256
    stride: int | None = None
    limit: int | None = None
    sequences: int = 32
    batch_size: int = 8
    dtype: str = "auto"


@dataclass(frozen=True)
class _Loaded:
    subject: Subject
    model_sha256: str
    windows: Windows
    calibration: Calibration


def run(
    subjects: Sequence[Subject],
    *,
    out: Path,
    methods: Sequence[str] = METHODS,
    sparsities: Sequence[float] = SPARSITIES,
    protocols: Sequence[str] = ("every-token",),
    settings: Settings | None = None,
) -> list[dict[str, Any]]:
    """Measures every cell that the file `out` does not hold yet, and returns all of its cells.

    A budget that a method cannot meet is a cell too, with "refused" in the place of a result.
    Raises SparsifyError for an unknown method, model or text, or a file that this module did not write.
    """
    settings = settings or Settings()
    for label in methods:
        parse_method(label, 0.5)
        parse_allocation(label)
    for subject in subjects:
        loaded = _load(subject, settings)
        for label, sparsity in [(DENSE, 0.0), *((m, s) for m in methods for s in sparsities)]:
            held = {_digest(cell["key"]) for cell in read_cells(out)}
            keys = [_key(loaded, label, sparsity, protocol, settings) for protocol in protocols]
            pending = [key for key in keys if _digest(key) not in held]
            for cell in _measure(loaded, label, sparsity, pending, settings):
                _append(out, cell)
                outcome = cell.get("refused") or f"perplexity {cell['result']['quality']['perplexity']:.4f}"
                _log.info("%s %s %s %s: %s", subject.name, label, sparsity, cell["key"]["protocol"], outcome)
    return read_cells(out)


def parse_method(label: str, sparsity: float) -> Method:
    """Returns the method of a label such as "teal" or "rsparse:rho=0.95,score=magnitude@greedy" at one sparsity."""
    name, _, rest = label.partition("@")[0].partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise SparsifyError(f"method {label!r} is not of the form NAME[:OPTION=VALUE[,OPTION=VALUE]][@ALLOCATION]")
        try:
            options[option] = float(value)
        except ValueError:
            options[option] = value
    return get_method(name).configure(sparsity=sparsity, **options)


def parse_allocation(label: str) -> Allocation | None:
    """Returns the allocation that a label names after its "@"; None, the method's own, where it names none."""
    name = label.partition("@")[2]
    return get_allocation(name) if name else None


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Returns the cells of a results file, none where it does not exist. Raises SparsifyError where it is another's."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            raise SparsifyError(
                f"{path} has schema_version {data['schema_version']!r}, this sparsify writes {SCHEMA_VERSION}: "
                "name another file"
            )
        cells: list[dict[str, Any]] = data["cells"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, SparsifyError):
            raise
        raise SparsifyError(f"{path} is not a results file of this command ({error}): name another file") from error
    return cells


def _load(subject: Subject, settings: Settings) -> _Loaded:
    tokenizer = load_tokenizer(subject.model)
    text = read_text(subject.evaluation)
    evaluation = windows(text, tokenizer, seq_len=settings.seq_len, stride=settings.stride, limit=settings.limit)
    calibration = Calibration.from_text(
        read_text(subject.calibration), tokenizer, sequences=settings.sequences, seq_len=settings.seq_len
    )
    model = load_dense(subject.model, dtype=settings.dtype)
    return _Loaded(subject, weights_sha256(model), evaluation, calibration)


def weights_sha256(model: PreTrainedModel) -> str:
    """Returns the SHA-256 of the model's parameters and buffers: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _key(loaded: _Loaded, label: str, sparsity: float, protocol: str, settings: Settings) -> dict[str, Any]:
    evaluation = loaded.windows
    return {
        "model": loaded.subject.name,
        "model_sha256": loaded.model_sha256,
        "dtype": settings.dtype,
        "method": label,
        "sparsity": sparsity,
        "protocol": protocol,
        "text": evaluation.name,
        "text_sha256": evaluation.sha256,
        "windows": len(evaluation.tokens),
        "seq_len": evaluation.seq_len,
        "stride": evaluation.stride,
        "bos": evaluation.bos,
        "calibration": loaded.calibration.fingerprint,
        "sparsify_version": sparsify.__version__,
    }


def _measure(
    loaded: _Loaded, label: str, sparsity: float, pending: list[dict[str, Any]], settings: Settings
) -> Iterator[dict[str, Any]]:
    if not pending:
        return
    model = load_dense(loaded.subject.model, dtype=settings.dtype)
    if label != DENSE:
        try:
            convert(model, parse_method(label, sparsity), loaded.calibration, allocation=parse_allocation(label))
        except UnavailableError:
            raise
        except SparsifyError as error:
            yield from ({"key": key, "refused": str(error)} for key in pending)
            return
    for key in pending:
        started = time.perf_counter()
        with RealisedDensity(model) as realised:
            quality = perplexity(model, loaded.windows, protocol=key["protocol"], batch_size=settings.batch_size)
        result: dict[str, Any] = {"quality": quality.to_dict()}
        if label != DENSE:
            result |= _sparsity(model, realised)
        yield {"key": key, "result": result | {"seconds": round(time.perf_counter() - started, 1)}}


def _sparsity(model: PreTrainedModel, realised: RealisedDensity) -> dict[str, Any]:
    ledger = ledger_of(model)
    measured = ledger.with_densities(realised.densities())
    entries = model.config.quantization_config.linears
    return {
        "nominal_sparsity": ledger.nominal_sparsity,
        "weighted_sparsity": ledger.weighted_sparsity,
        "realised_sparsity": measured.weighted_sparsity,
        "realised_model_sparsity": measured.model_sparsity,
        "linears": [
            {"name": linear.name, "shape": [linear.outputs, linear.inputs]} | asdict(entries[linear.name])
            for linear in ledger.linears
        ],
    }


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _append(path: Path, cell: dict[str, Any]) -> None:
    """Adds a cell by writing the file anew beside itself and renaming it: a kill leaves the old or the new one."""
    data = {"schema_version": SCHEMA_VERSION, "cells": [*read_cells(path), cell]}
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    staged.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.compare", description=__doc__)
    parser.add_argument(
        "--model", nargs=3, action="append", metavar=("MODEL", "CALIBRATION", "EVALUATION"), default=[],
        help="a model and its two texts; may be given again",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the results file (JSON); cells in it are not redone")
    parser.add_argument("--markdown", type=Path, help="write the table of all cells in --out here")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME[:OPTION=VALUE][@ALLOCATION]")
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--protocols", nargs="+", default=("every-token",))
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--limit", type=int, help="evaluation windows at most")
    parser.add_argument("--sequences", type=int, default=32, help="calibration windows")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    settings = Settings(args.seq_len, args.stride, args.limit, args.sequences, args.batch_size, args.dtype)
    try:
        cells = run(
            [Subject(*specs) for specs in args.model], out=args.out, methods=args.methods,
            sparsities=args.sparsities, protocols=args.protocols, settings=settings,
        )  # fmt: skip
    except SparsifyError as error:
        _log.error("error: %s", error)
        return error.exit_code
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(render(cells), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
