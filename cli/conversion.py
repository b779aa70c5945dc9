"""One conversion from its settings: checked, calibrated, converted, measured, saved."""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.cli.budgets import DEFAULT_SPARSITY, meet_budget, settle_budget
from sparsify.cli.ledger_view import ledger_totals
from sparsify.cli.loading import pick_device
from sparsify.cli.measurement import measure
from sparsify.cli.ppl_p_conversion import PPL_P, check_ppl_p, convert_ppl_p
from sparsify.cli.progress import Progress
from sparsify.cli.relufy_conversion import (
    cut_of,
    is_relufy,
    relufication_of,
    relufy_model,
    said_of,
    settle_relufy,
)
from sparsify.cli.settings import ConvertSettings
from sparsify.errors import SparsifyError, UnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsify.allocation import Allocation
    from sparsify.calibration import Calibration
    from sparsify.config import SparsifyConfig
    from sparsify.methods import AnyMethod
    from sparsify.processes import Processes
    from sparsify.text import Windows


def run_conversion(settings: ConvertSettings, progress: Progress) -> dict[str, Any]:
    """Converts and saves; what can be wrong cheaply is checked first. Returns what the command reports."""
    from sparsify import checkpoint
    from sparsify.ledger import ledger_of
    from sparsify.methods.relu import Relu
    from sparsify.plain_checkpoint import save_plain
    from sparsify.runtime import set_prefill

    started = time.monotonic()
    by_neurons = settings.method == PPL_P
    if by_neurons:
        check_ppl_p(settings)
    asked, settings = settings, settle_budget(settle_relufy(settings))
    method = None if by_neurons else configure(settings)
    allocation = None if method is None else allocate(settings, method)
    device = pick_device(settings.device)
    processes = _processes(settings, device)
    out = check_out(settings.out)
    spec = check_model(settings.model)
    tokenizer, calibration, held_out, windows = read_texts(spec, settings, progress)
    calibration = replace(calibration, processes=processes)
    # No process may look for `out` after the first has made it.
    processes.wait()

    def make() -> "PreTrainedModel":
        return _load_dense(spec, settings, device, progress)

    source = source_of(spec)
    relufied: dict[str, Any] | None = None
    if is_relufy(asked):
        model = make()
        relufied = relufy_model(model, asked, calibration, windows, progress)
        if not asked.plain and asked.activation == "fatrelu":
            assert isinstance(method, Relu)
            method = replace(method, cut=cut_of(model))
    if asked.plain:
        assert relufied is not None
        progress.note(f"writing {out}")
        how = relufication_of(asked)
        save_plain(model, out, tokenizer, how=how, source=source, said=said_of(relufied))
        report = {"model": spec, "out": str(out), "dry_run": False, "seconds": time.monotonic() - started}
        return report | {"relufied": relufied, "ledger": None, "measured": None, "budget": None}
    if method is not None and allocation is not None:
        made = make if relufied is None else lambda: model
        model, met = meet_budget(settings, made, method, allocation, calibration, held_out, progress)
    else:
        assert held_out is not None
        model, met = convert_ppl_p(settings, make, calibration, held_out, progress)
    if not processes.first:
        processes.wait()
        return {}
    config: SparsifyConfig = model.config.quantization_config
    config.prefill = settings.prefill or config.prefill
    set_prefill(model, config.prefill)
    measured = _measure(model, windows, progress) if windows is not None else None
    progress.note(f"writing {out}")
    card = card_rows(measured) if measured is not None else None
    said = None if relufied is None else said_of(relufied)
    # As settled, so that defaults of another version change nothing; relufy is what was asked for, not its relu.
    settled = asdict(replace(settings, method=asked.method, cut=asked.cut, cett=asked.cett))
    checkpoint.save(
        model, out, tokenizer, source=source, settings=settled, measured=card, budget=met.said, relufied=said
    )
    processes.wait()
    report = {"model": spec, "out": str(out), "dry_run": False, "seconds": time.monotonic() - started}
    return (
        report
        | describe(config)
        | {"ledger": ledger_totals(ledger_of(model)), "measured": measured, "budget": met.found, "relufied": relufied}
    )


def source_of(spec: str) -> str:
    """Returns what the card calls the dense model."""
    from sparsify.models import ALIASES

    return Path(spec).name if Path(spec).is_dir() else ALIASES.get(spec, spec)


def _processes(settings: ConvertSettings, device: str) -> "Processes":
    """Returns the processes that convert together; what only one can do is refused."""
    from sparsify.processes import launched

    processes = launched(cpu=device.startswith("cpu"))
    alone = ("speedup", "allocation_state", "reconstruct_state", "plain")
    asked = [f"--{name.replace('_', '-')}" for name in alone if getattr(settings, name) not in (None, False)]
    if processes.count > 1 and asked:
        raise SparsifyError(
            f"{asked[0]} is for one process, and {processes.count} are here: start one, without a launcher"
        )
    return processes


def configure(settings: ConvertSettings) -> "AnyMethod":
    """Returns the method; an option that it does not take is refused, one that was not given is left to it."""
    from sparsify.methods import get_method

    about = get_method(settings.method)
    if about.facts.choice == "per-prompt" and settings.prefill == "sparse":
        raise SparsifyError(
            f"method {about.name} chooses neurons by a prompt that runs dense: leave --prefill out, or set it to dense"
        )
    names = ("rho", "score", "recipe", "rotation", "cut", "cett", "svd")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(settings, name)) is not None}
    if settings.compensate:
        given["compensate"] = True
    if settings.sparsity is not None:
        given["sparsity"] = settings.sparsity
    elif settings.max_ppl_increase is not None or settings.speedup is not None:
        # It is looked for, from here.
        given["sparsity"] = DEFAULT_SPARSITY
    return about.configure(**given)


def allocate(settings: ConvertSettings, method: "AnyMethod") -> "Allocation":
    """Returns the allocation, with the state file and the seed where it is one that takes them."""
    from sparsify.allocation import allocation_of
    from sparsify.allocation.evolutionary import Evolutionary

    allocation = allocation_of(settings.allocation, method)
    if isinstance(allocation, Evolutionary):
        return replace(allocation, seed=settings.seed, state=settings.allocation_state)
    if settings.allocation_state is not None:
        raise SparsifyError(
            f"--allocation-state is for allocation evolutionary, and {allocation.name} keeps no state: leave it out"
        )
    return allocation


def check_out(out: str | None, *, resume: bool = False) -> Path:
    """Checks, before hours of work, that the folder can be made at their end; one that is resumed may be there."""
    from sparsify.new_folder import check_output

    if out is None:
        raise SparsifyError("no --out: name the folder to write, which must not exist yet")
    path = Path(out)
    if not resume:
        check_output(path)
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise SparsifyError(f"--out {out}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UnavailableError(f"--out {out}: no permission to write in {parent}")
    return path


def check_model(model: str | None) -> str:
    """Returns the MODEL of the settings. Raises SparsifyError where there is none, or not such a one."""
    from sparsify.models import resolve_model

    if model is None:
        raise SparsifyError("no MODEL: give a folder, a hub id, an alias or reference, or `model:` in --config")
    resolve_model(model)
    return model


def read_texts(
    spec: str, settings: ConvertSettings, progress: Progress
) -> "tuple[PreTrainedTokenizerBase, Calibration, Windows | None, Windows | None]":
    """Reads all texts before the model, which takes longer and whose load a short text would waste.

    Returns the tokenizer, calibration windows, held-out windows for a budget that needs them, windows for the card.
    """
    from sparsify.calibration import Calibration
    from sparsify.evals.quality_budget import held_out_texts
    from sparsify.models import load_tokenizer
    from sparsify.text import default_evaluation_text, read_text, windows

    for name, least in (("sequences", 1), ("eval_windows", 0)):
        if getattr(settings, name) < least:
            raise SparsifyError(f"{name} is {getattr(settings, name)}: it must be at least {least}")
    held_out = None
    shape = {"sequences": settings.sequences, "seq_len": settings.seq_len}
    if settings.max_ppl_increase is None or settings.held_out is None:
        text = read_text(settings.calibration)
        tokenizer = load_tokenizer(spec, trust_remote_code=settings.trust_remote_code)
        calibration = Calibration.from_text(text, tokenizer, **shape)
    else:
        tokenizer = load_tokenizer(spec, trust_remote_code=settings.trust_remote_code)
        calibration, held_out = held_out_texts(settings.calibration, tokenizer, held_out=settings.held_out, **shape)
    if settings.eval_windows == 0:
        return tokenizer, calibration, held_out, None
    evaluation, why = default_evaluation_text(spec)
    progress.note(why)
    return tokenizer, calibration, held_out, windows(
        evaluation, tokenizer, seq_len=settings.seq_len, limit=settings.eval_windows
    )  # fmt: skip


def _load_dense(spec: str, settings: ConvertSettings, device: str, progress: Progress) -> "PreTrainedModel":
    import torch

    from sparsify.models import check_context, load_dense

    torch.manual_seed(settings.seed)
    _check_memory(spec, settings.dtype, device)
    progress.note(f"loading {spec}")
    model = load_dense(spec, dtype=settings.dtype, device=device, trust_remote_code=settings.trust_remote_code)
    check_context(model, settings.seq_len)
    return model


def _check_memory(spec: str, dtype: str, device: str) -> None:
    """Raises UnavailableError where the weights alone are more than the memory that can be had."""
    import torch

    from sparsify.evals.machine import available_memory
    from sparsify.models import parse_dtype, resolve_model
    from sparsify.preflight import weight_bytes

    needed = weight_bytes(Path(resolve_model(spec)), parse_dtype(dtype))
    free = available_memory(torch.device(device))
    if needed is not None and free is not None and needed > free:
        raise UnavailableError(
            f"{spec} has {needed / 1e9:.1f} GB of weights, and {device} has {free / 1e9:.1f} GB of memory to spare: "
            "--stream converts one block at a time, with --method rsparse, teal or wina among others"
        )


def _measure(model: "PreTrainedModel", windows: "Windows", progress: Progress) -> dict[str, Any] | None:
    from sparsify.prompt_choice import chooses_per_prompt

    try:
        protocol = "decode" if chooses_per_prompt(model) else "every-token"
        return measure(model, windows, progress, label="measure", protocol=protocol)
    except SparsifyError as error:
        # The conversion is done by now, and worth more than its card.
        progress.note(f"not measured: {error}")
        return None


def card_rows(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the table of the model card from measure's result."""
    rows = {}
    for name, size in (("dense", "dense_bytes_per_token"), ("sparse", "touched_bytes_per_token")):
        about = measured[name]
        rows[name] = {
            "perplexity": about["perplexity"],
            "bits per byte": about["bits_per_byte"],
            "realised sparsity": measured["realised_sparsity"] if name == "sparse" else 0.0,
            "bytes per token": round(measured[size]),
            "text": about["text"],
            "windows": f"{about['windows']} × {about['seq_len']}",
            "protocol": about["protocol"],
        }
    return rows


def describe(config: "SparsifyConfig") -> dict[str, Any]:
    """Returns what the command reports of a configuration."""
    entries = config.linears
    worst = max(entries, key=lambda name: entries[name].error)
    return {
        "method": config.method,
        "method_config": config.method_config,
        "allocation": config.allocation,
        "prefill": config.prefill,
        "calibration": asdict(config.calibration),
        "low_rank_linears": sum(entry.rank > 0 for entry in entries.values()),
        # The same whatever the order: a configuration that was read from its file is in another.
        "mean_error": math.fsum(entry.error for entry in entries.values()) / len(entries),
        "svd": _sketched(config),
        "worst_error": {"linear": worst, "error": entries[worst].error},
    }


def _sketched(config: "SparsifyConfig") -> dict[str, Any] | None:
    """Returns how many factors are of a randomised SVD, and their errors ‖W − L‖/‖W‖; None where none is."""
    errors = {n: e.low_rank_error for n, e in config.linears.items() if e.low_rank_error is not None}
    if not errors:
        return None
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    return {"randomised": len(errors), "mean_error": mean, "worst_error": {"linear": worst, "error": errors[worst]}}
