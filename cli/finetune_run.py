"""One finetuning from its settings: checked, trained, measured, written, and converted where that is asked for."""

import gc
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsify.cli.conversion import check_model, check_out
from sparsify.cli.finetune_card import CURVES, render_card
from sparsify.cli.finetune_measure import Texts, convert_finetuned, measure_finetuned, read_texts
from sparsify.cli.finetune_view import FinetuneView
from sparsify.cli.loading import pick_device
from sparsify.errors import SparsifyError, UnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    texts = read_texts(settings, spec, tokenizer, view)
    teacher = _load_teacher(settings, spec, tokenizer, view) if settings.distillation else None

    def load() -> "PreTrainedModel":
        view.note(f"loading {spec}")
        return load_dense(spec, dtype="float32", trust_remote_code=trust)

    done = finetune(load, tokenizer, source, settings, state, teacher=teacher, see=view.see, note=view.note)
    if not done.main:
        return None
    # What the training held is needed for what is measured.
    del teacher
    gc.collect()
    model, measured = _load_and_measure(done, texts, spec, settings, view)
    shift = settings.shift if measured is None else measured["shift"]
    result = {
        "model": spec, "out": str(out), "sparse_out": None if sparse_out is None else str(sparse_out),
        "state": str(state), "method": settings.method, "steps": done.schedule.steps, "tokens": done.tokens,
        "stages": asdict(done.schedule), "resumed_from": done.resumed_from, "shift": shift, "measured": measured,
        "settings": asdict(settings),
    }  # fmt: skip
    view.note(f"writing {out}")
    _write(model, tokenizer, out, result, done)
    if sparse_out is not None and texts.calibration is not None:
        view.note(f"converting with method relu, cut {shift:g}")
        result["sparse"] = convert_finetuned(
            model, tokenizer, texts.calibration, sparse_out, spec, float(shift), settings
        )
    return result | {"seconds": time.monotonic() - started}


def _folders(settings: "FinetuneSettings") -> tuple[Path, Path | None, Path]:
    out = check_out(settings.out)
    sparse_out = None if settings.sparse_out is None else check_out(settings.sparse_out)
    if sparse_out is not None and sparse_out.absolute() == out.absolute():
        raise SparsifyError(f"--sparse-out and --out are both {out}: the sparse checkpoint needs a folder of its own")
    if sparse_out is not None and settings.method == "dense":
        raise SparsifyError(
            "--sparse-out is for a model with ReLU, and method dense keeps the activation: leave it out"
        )
    return out, sparse_out, Path(settings.state) if settings.state else out.with_name(f"{out.name}.state")


def _model_and_text(settings: "FinetuneSettings") -> tuple[str, str]:
    spec = check_model(settings.model)
    if settings.text is None:
        raise SparsifyError(
            "no --text to train on: give a text file, hf:DATASET:CONFIG:SPLIT, or stdlib:library for reference"
        )
    return spec, settings.text


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnavailableError("the curves need matplotlib: pip install 'sparsify-llm[train]'") from None


def _load_teacher(
    settings: "FinetuneSettings", spec: str, tokenizer: "PreTrainedTokenizerBase", view: FinetuneView
) -> "PreTrainedModel":
    from sparsify.models import load_dense

    name = settings.teacher or spec
    view.note(f"loading the teacher {name}")
    half = "bfloat16" if settings.precision == "bf16" else "float32"
    teacher = load_dense(name, dtype=half, trust_remote_code=settings.trust_remote_code)
    embedding: Any = teacher.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    if rows < len(tokenizer):
        raise SparsifyError(
            f"the teacher {name} has {rows} tokens and the tokenizer of MODEL {len(tokenizer)}: distillation needs a "
            "teacher with the same tokenizer"
        )
    return teacher


def _load_and_measure(
    done: "Finetuned", texts: Texts, spec: str, settings: "FinetuneSettings", view: FinetuneView
) -> "tuple[PreTrainedModel, dict[str, Any] | None]":
    """Returns the trained model in the dtype of the result, and what was measured; one model at a time is loaded."""
    from sparsify.evals.perplexity import perplexity
    from sparsify.models import load_dense

    options: dict[str, Any] = {"device": pick_device(settings.device), "trust_remote_code": settings.trust_remote_code}
    base = load_dense(spec, dtype=settings.dtype, **options)
    # The trainer has switched the cache off in the configuration.
    dtype, use_cache = str(base.dtype).removeprefix("torch."), getattr(base.config, "use_cache", True)
    before = None if texts.evaluation is None else perplexity(base, texts.evaluation).to_dict()
    del base
    model = load_dense(str(done.folder), dtype=dtype, **options)
    model.config.use_cache = use_cache
    return model, None if before is None else measure_finetuned(model, before, texts, settings, view)


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
