"""One finetuning from its settings: checked, trained, measured, written, and converted where that is asked for."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsify.cli.conversion import check_out
from sparsify.cli.finetune_card import CURVES, render_card
from sparsify.cli.finetune_view import FinetuneView
from sparsify.errors import SparsifyError, UnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsify.neuron_cut import Mlp
    from sparsify.text import Windows
    from sparsify.training.finetune import Finetuned
    from sparsify.training.settings import FinetuneSettings

SETTINGS, RECORD = "finetune.yaml", "training.json"


def run_finetune(settings: "FinetuneSettings", view: FinetuneView) -> dict[str, Any] | None:
    """Trains and writes; what can be wrong cheaply is checked first. Returns what the command reports.

    None in the other processes of `accelerate launch`, which only train.
    """
    from sparsify.models import load_dense, load_tokenizer
    from sparsify.training.finetune import finetune
    from sparsify.training.source import open_source

    started = time.monotonic()
    out, sparse_out, state = _folders(settings)
    spec, text = _model_and_text(settings)
    _check_matplotlib()
    trust = settings.trust_remote_code
    tokenizer, source = load_tokenizer(spec, trust_remote_code=trust), open_source(text)
    windows = _windows(settings, spec, tokenizer, view)
    teacher = None
    if settings.distillation:
        view.note(f"loading the teacher {settings.teacher or spec}")
        half = "bfloat16" if settings.precision == "bf16" else "float32"
        teacher = load_dense(settings.teacher or spec, dtype=half, trust_remote_code=trust)
        _check_teacher(settings.teacher or spec, teacher, tokenizer)

    def load() -> "PreTrainedModel":
        view.note(f"loading {spec}")
        return load_dense(spec, dtype="float32", trust_remote_code=trust)

    done = finetune(load, tokenizer, source, settings, state, teacher=teacher, see=view.see, note=view.note)
    if not done.main:
        return None
    base = load_dense(spec, dtype=settings.dtype, trust_remote_code=trust)
    model = load_dense(str(done.folder), dtype=str(base.dtype).removeprefix("torch."), trust_remote_code=trust)
    measured = None if windows is None else _measure(base, model, tokenizer, windows, settings, view)
    shift = settings.shift if measured is None else measured["shift"]
    result = {
        "model": spec, "out": str(out), "sparse_out": None if sparse_out is None else str(sparse_out),
        "state": str(state), "method": settings.method, "steps": done.schedule.steps, "tokens": done.tokens,
        "stages": asdict(done.schedule),
        "resumed_from": done.resumed_from, "shift": shift, "measured": measured, "settings": asdict(settings),
    }  # fmt: skip
    view.note(f"writing {out}")
    _write(model, tokenizer, out, result, done)
    if sparse_out is not None:
        result["sparse"] = _convert(model, tokenizer, sparse_out, spec, float(shift), settings, view)
    return result | {"seconds": time.monotonic() - started}


def is_main_process() -> bool:
    """Whether this is the process that writes, of those that accelerate or torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _folders(settings: "FinetuneSettings") -> tuple[Path, Path | None, Path]:
    out = check_out(settings.out, needed=True)
    assert out is not None
    sparse_out = check_out(settings.sparse_out, needed=False)
    if sparse_out is not None and sparse_out.absolute() == out.absolute():
        raise SparsifyError(f"--sparse-out and --out are both {out}: the sparse checkpoint needs a folder of its own")
    if sparse_out is not None and settings.method == "dense":
        raise SparsifyError(
            "--sparse-out is for a model with ReLU, and method dense keeps the activation: leave it out"
        )
    return out, sparse_out, Path(settings.state) if settings.state else out.with_name(f"{out.name}.state")


def _model_and_text(settings: "FinetuneSettings") -> tuple[str, str]:
    from sparsify.models import resolve_model

    if settings.model is None:
        raise SparsifyError("no MODEL: give a folder, a hub id, an alias or reference, or `model:` in --config")
    if settings.text is None:
        raise SparsifyError(
            "no --text to train on: give a text file, hf:DATASET:CONFIG:SPLIT, or stdlib:library for reference"
        )
    resolve_model(settings.model)
    return settings.model, settings.text


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnavailableError("the curves need matplotlib: pip install 'sparsify-llm[train]'") from None


def _check_teacher(name: str, teacher: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    embedding: Any = teacher.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    if rows < len(tokenizer):
        raise SparsifyError(
            f"the teacher {name} has {rows} tokens and the tokenizer of MODEL {len(tokenizer)}: distillation needs a "
            "teacher with the same tokenizer"
        )


def _windows(
    settings: "FinetuneSettings", spec: str, tokenizer: "PreTrainedTokenizerBase", view: FinetuneView
) -> "Windows | None":
    from sparsify.text import default_evaluation_text, read_text, windows

    if not settings.eval_windows:
        return None
    if settings.evaluation is None:
        text, why = default_evaluation_text(spec)
        view.note(why)
    else:
        text = read_text(settings.evaluation)
    return windows(text, tokenizer, seq_len=settings.context, limit=settings.eval_windows)


def _measure(
    base: "PreTrainedModel",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    windows: "Windows",
    settings: "FinetuneSettings",
    view: FinetuneView,
) -> dict[str, Any]:
    """Returns the perplexities before and after, the shift, and the zeros without and with it."""
    from sparsify.evals.ffn_sparsity import ffn_sparsity
    from sparsify.evals.perplexity import perplexity
    from sparsify.training.finetune import substitute

    view.note(f"measuring on {len(windows.tokens)} windows of {windows.name}")
    before, after = perplexity(base, windows), perplexity(model, windows)
    found: dict[str, Any] = {"before": before.to_dict(), "after": after.to_dict(), "shift": None, "shifts": []}
    if settings.method == "dense":
        return found
    mlps = substitute(model)
    found |= _choose_shift(model, mlps, tokenizer, len(windows.tokens), settings, view)
    for shift in dict.fromkeys((0.0, found["shift"])):
        point = ffn_sparsity(model, mlps, windows, shift)
        found["shifts"].append(asdict(point) | {"mean": point.mean})
    return found


def _choose_shift(
    model: "PreTrainedModel",
    mlps: "tuple[Mlp, ...]",
    tokenizer: "PreTrainedTokenizerBase",
    count: int,
    settings: "FinetuneSettings",
    view: FinetuneView,
) -> dict[str, Any]:
    """Returns the shift, and what was measured of others on the calibration text where it is auto."""
    from sparsify.evals.ffn_sparsity import largest_shift
    from sparsify.text import read_text, windows
    from sparsify.training.settings import AUTO

    if settings.shift != AUTO:
        return {"shift": float(settings.shift)}
    tried = windows(read_text(settings.calibration), tokenizer, seq_len=settings.context, limit=count)
    view.note(f"choosing the shift on {len(tried.tokens)} windows of {tried.name}")
    shift, points = largest_shift(model, mlps, tried, settings.shift_rise)
    return {"shift": shift, "shift_search": [asdict(point) | {"mean": point.mean} for point in points]}


def _write(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    result: dict[str, Any],
    done: "Finetuned",
) -> None:
    """Writes an ordinary Hugging Face folder with its card, its curves, its settings and what was logged."""
    from sparsify.evals.training_plot import save_training_plot
    from sparsify.models import quiet
    from sparsify.new_folder import new_folder

    model.config.use_cache = True
    with new_folder(out) as folder:
        with quiet():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        title = f"{result['model']}, {result['method']}, {done.tokens:,} tokens"
        save_training_plot(done.history, done.tokens // done.schedule.steps, title, folder / CURVES)
        record = {key: value for key, value in result.items() if key != "settings"} | {"history": done.history}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / SETTINGS).write_text(yaml.safe_dump(result["settings"], sort_keys=False), encoding="utf-8")
        (folder / "README.md").write_text(render_card(out.name, result), encoding="utf-8")


def _convert(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    spec: str,
    shift: float,
    settings: "FinetuneSettings",
    view: FinetuneView,
) -> dict[str, Any]:
    """Writes the sparse checkpoint of method relu with the shift as its cut; returns its ledger's totals."""
    from sparsify import checkpoint
    from sparsify.calibration import Calibration
    from sparsify.cli.ledger_view import ledger_totals
    from sparsify.conversion import convert
    from sparsify.ledger import ledger_of
    from sparsify.methods.relu import Relu
    from sparsify.text import read_text

    view.note(f"converting with method relu, cut {shift:g}")
    calibration = Calibration.from_text(
        read_text(settings.calibration), tokenizer, sequences=16, seq_len=settings.context
    )
    convert(model, Relu(cut=shift), calibration)
    said = f"finetuned with method {settings.method}, see training.json of the plain checkpoint"
    checkpoint.save(model, out, tokenizer, source=spec, relufied=said)
    return ledger_totals(ledger_of(model))
