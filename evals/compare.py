"""Methods × sparsities × protocols × calibration seeds on a model, resumable: what `sparsify compare` runs.

Every finished cell is written at once; a run that is started again with the same file skips what it holds. A cell is
identified by everything that its number depends on: weights, texts, calibration, windows, method, protocol, version.
The generation check stands in a part of its own, so that a later run can add it. Not covered: speed, accuracy tasks.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import sparsify
from sparsify.errors import SparsifyError
from sparsify.evals.cells import Cell, CellFile, part_of, read_cells, take_parts
from sparsify.evals.compare_cell import DENSE, measured
from sparsify.evals.compare_labels import parse_allocation, parse_method, parse_rotate
from sparsify.evals.compare_subject import LoadedSubject, Settings, Subject, load_subject
from sparsify.evals.perplexity import check_protocol
from sparsify.processes import ONE, Processes

__all__ = ["Settings", "Subject", "parse_allocation", "parse_method", "read_cells", "run"]

METHODS = ("teal", "wina", "rsparse", "auto")
SPARSITIES = (0.25, 0.4, 0.5, 0.6, 0.7)

_log = logging.getLogger("sparsify.evals.compare")


def run(
    subjects: Sequence[Subject],
    *,
    out: Path,
    methods: Sequence[str] = METHODS,
    sparsities: Sequence[float] = SPARSITIES,
    protocols: Sequence[str] = ("every-token",),
    seeds: int = 1,
    settings: Settings | None = None,
    note: Callable[[str], None] = _log.info,
    processes: Processes = ONE,
) -> list[Cell]:
    """Measures every cell that the file `out` does not hold yet, and returns all of its cells.

    Seeds 0 .. seeds−1 draw the calibration windows (`Calibration.from_text`); the dense cell has none. note is called
    with a line after each cell. What a method or a budget refuses is a cell too, with "refused" in the place of a
    result. processes: measure every so many-th cell each, into files beside `out`, which the first takes into it; what
    they held when a run was stopped is taken by the next one.
    Raises SparsifyError for an unknown method, protocol, model or text, or a file that this module did not write.
    """
    settings = settings or Settings()
    _check(methods, sparsities, protocols, seeds)
    file = _with_parts(out, (), processes)
    for subject in subjects:
        loaded = load_subject(subject, settings, seeds)
        pending = _pending(loaded, file, methods, sparsities, protocols)
        own = pending[processes.index :: processes.count]
        into = file if processes.count == 1 else CellFile(part_of(out, processes.index))
        total, done, started = sum(map(len, own)), 0, time.perf_counter()
        for cells in own:
            for cell in measured(loaded, cells):
                into.put(cell)
                done += 1
                took = time.perf_counter() - started
                left = took / done * (total - done)
                note(f"{done}/{total} {_line(cell)}; {_duration(took)} so far, about {_duration(left)} left")
        if processes.count > 1:
            file = _with_parts(out, [cell["key"] for cells in pending for cell in cells], processes)
    return file.cells


def _with_parts(out: Path, order: Sequence[dict[str, Any]], processes: Processes) -> CellFile:
    """Returns the file with what the processes have measured for it, in that order; waits until all have."""
    processes.wait()
    if processes.first:
        take_parts(CellFile(out), order)
    processes.wait()
    return CellFile(out)


def _check(methods: Sequence[str], sparsities: Sequence[float], protocols: Sequence[str], seeds: int) -> None:
    for label in methods:
        for sparsity in sparsities:
            parse_method(label, sparsity)
        parse_allocation(label)
        parse_rotate(label)
    for protocol in protocols:
        check_protocol(protocol)
    if seeds < 1:
        raise SparsifyError(f"the number of calibration seeds must be at least 1, not {seeds}")


def _pending(
    loaded: LoadedSubject, file: CellFile, methods: Sequence[str], sparsities: Sequence[float], protocols: Sequence[str]
) -> list[list[Cell]]:
    """Returns the cells to measure, those of one conversion together.

    Seed by seed: a run that is stopped holds whole tables.
    """
    plan = [(DENSE, 0.0, None), *((m, s, seed) for seed in loaded.calibrations for m in methods for s in sparsities)]
    pending = []
    for label, sparsity, seed in dict.fromkeys(plan):
        keys = [_key(loaded, label, sparsity, seed, protocol) for protocol in dict.fromkeys(protocols)]
        cells = [file.find(key) or {"key": key} for key in keys]
        pending.append([cell for cell in cells if not _complete(cell, loaded.settings)])
    return [cells for cells in pending if cells]


def _complete(cell: Cell, settings: Settings) -> bool:
    if "refused" in cell:
        return True
    wanted = settings.generation
    return "result" in cell and (wanted is None or cell.get("generation", {}).get("settings") == asdict(wanted))


def _key(loaded: LoadedSubject, label: str, sparsity: float, seed: int | None, protocol: str) -> dict[str, Any]:
    evaluation = loaded.windows
    return {
        "model": loaded.subject.name,
        "model_sha256": loaded.model_sha256,
        "dtype": loaded.settings.dtype,
        "device": torch.device(loaded.settings.device or "cpu").type,
        "method": label,
        "sparsity": sparsity,
        "protocol": protocol,
        "text": evaluation.name,
        "text_sha256": evaluation.sha256,
        "windows": len(evaluation.tokens),
        "seq_len": evaluation.seq_len,
        "stride": evaluation.stride,
        "bos": evaluation.bos,
        "seed": seed,
        "calibration": None if seed is None else loaded.calibrations[seed].fingerprint,
        "sparsify_version": sparsify.__version__,
    }


def _line(cell: Cell) -> str:
    key = cell["key"]
    what = f"{key['model']}, {key['method']}"
    if key["seed"] is not None:
        what += f" {key['sparsity']:.0%}, seed {key['seed']}"
    if "refused" in cell:
        return f"{what}, {key['protocol']}: refused, {cell['refused']}"
    quality, divergence = cell["result"]["quality"], cell["result"]["divergence"]
    return f"{what}, {key['protocol']}: perplexity {quality['perplexity']:.4f}, KL {divergence['kl']:.4f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
