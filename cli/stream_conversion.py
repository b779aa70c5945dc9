"""`sparsify convert --stream`: one block in memory at a time, resumable; the settings and the files are the same."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sparsify.cli.budgets import settle_budget
from sparsify.cli.conversion import (
    allocate,
    card_rows,
    check_model,
    check_out,
    configure,
    describe,
    read_texts,
    source_of,
)
from sparsify.cli.ledger_view import ledger_totals
from sparsify.cli.loading import pick_device
from sparsify.cli.measurement import measure
from sparsify.cli.ppl_p_conversion import PPL_P
from sparsify.cli.progress import Progress
from sparsify.cli.relufy_conversion import is_relufy, settle_relufy
from sparsify.cli.settings import ConvertSettings
from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsify.text import Windows

_BATCH = 8


def run_streamed(settings: ConvertSettings, progress: Progress, *, resume: bool) -> dict[str, Any]:
    """Converts and saves block by block; returns what the command reports, as run_conversion does."""
    from sparsify.processes import launched
    from sparsify.streaming.conversion import convert_streamed, streaming_problem

    started = time.monotonic()
    refuse_unstreamable(settings)
    settings = settle_budget(settle_relufy(settings))
    method = configure(settings)
    allocation = allocate(settings, method)
    if (problem := streaming_problem(method, allocation, rotate=settings.rotate)) is not None:
        raise SparsifyError(problem)
    out = check_out(settings.out, resume=resume)
    device = pick_device(settings.device)
    if launched(cpu=device.startswith("cpu")).count > 1:
        raise SparsifyError("--stream is for one process, and several are here: start it without a launcher")
    spec = check_model(settings.model)
    tokenizer, calibration, _, windows = read_texts(spec, settings, progress)
    done = convert_streamed(
        spec, out, method, calibration, allocation=allocation, dtype=settings.dtype, device=device,
        prefill=settings.prefill, trust_remote_code=settings.trust_remote_code, tokenizer=tokenizer,
        source=source_of(spec), settings=asdict(settings), resume=resume, progress=progress, note=progress.note,
        evaluation=None if windows is None else StreamedMeasurement(windows, progress),
    )  # fmt: skip
    report = {"model": spec, "out": str(out), "dry_run": False, "seconds": time.monotonic() - started}
    return (
        report
        | describe(done.config)
        | {"ledger": ledger_totals(done.ledger), "measured": done.measured, "budget": None, "relufied": None}
    )


class StreamedMeasurement:
    """What `measure` finds, of a model whose blocks are not in memory together."""

    def __init__(self, windows: "Windows", progress: Progress) -> None:
        self._windows, self._progress = windows, progress

    def batches(self, model: "PreTrainedModel") -> "Sequence[Tensor]":
        from sparsify.evals.perplexity import batches_of

        return batches_of(model, self._windows, _BATCH)

    def densities(self, model: "PreTrainedModel", run: Callable[[], None]) -> dict[str, float]:
        from sparsify.evals.realised import RealisedDensity

        with RealisedDensity(model) as counted:
            run()
        return counted.densities()

    def measure(self, model: "PreTrainedModel", densities: Mapping[str, float]) -> dict[str, Any] | None:
        try:
            return measure(
                model, self._windows, self._progress, label="measure", batch_size=_BATCH, densities=densities
            )
        except SparsifyError as error:
            # The conversion is done by now, and worth more than its card.
            self._progress.note(f"not measured: {error}")
            return None

    def rows(self, measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return card_rows(measured)


def refuse_unstreamable(settings: ConvertSettings) -> None:
    """Raises SparsifyError for what cannot be converted block by block whatever its options are."""
    if is_relufy(settings) or settings.method == PPL_P:
        raise SparsifyError(f"method {settings.method} changes the whole model: leave --stream out")
    for name in ("max_ppl_increase", "speedup"):
        if getattr(settings, name) is not None:
            raise SparsifyError(
                f"--{name.replace('_', '-')} tries the whole model at several sparsities: with --stream give --sparsity"
            )
