"""What is measured of a finetuned model: perplexities, the shift, the zeros; and its conversion with method relu."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.cli.finetune_view import FinetuneView

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsify.calibration import Calibration
    from sparsify.neuron_cut import Mlp
    from sparsify.text import Windows
    from sparsify.training.settings import FinetuneSettings


@dataclass(frozen=True)
class Texts:
    """Windows to measure on, to choose the shift on, and to convert on; None for what is not asked for."""

    evaluation: "Windows | None"
    shift: "Windows | None"
    calibration: "Calibration | None"


def read_texts(
    settings: "FinetuneSettings", spec: str, tokenizer: "PreTrainedTokenizerBase", view: FinetuneView
) -> Texts:
    """Reads all of them before the training, whose hours a short text would waste. Raises SparsifyError for one."""
    from sparsify.calibration import Calibration
    from sparsify.text import default_evaluation_text, read_text, windows
    from sparsify.training.settings import AUTO

    context, limit = settings.context, settings.eval_windows
    evaluation = shift = calibration = None
    if limit:
        if settings.evaluation is None:
            text, why = default_evaluation_text(spec)
            view.note(why)
        else:
            text = read_text(settings.evaluation)
        evaluation = windows(text, tokenizer, seq_len=context, limit=limit)
    if settings.shift == AUTO and settings.method != "dense":
        shift = windows(read_text(settings.calibration), tokenizer, seq_len=context, limit=limit)
    if settings.sparse_out is not None:
        every = windows(read_text(settings.calibration), tokenizer, seq_len=context, limit=16)
        calibration = Calibration(every.tokens, every.name)
    return Texts(evaluation, shift, calibration)


def measure_finetuned(
    model: "PreTrainedModel", before: dict[str, Any], texts: Texts, settings: "FinetuneSettings", view: FinetuneView
) -> dict[str, Any]:
    """Returns the perplexities before and after, the shift, and the zeros without and with it."""
    from sparsify.evals.ffn_sparsity import ffn_sparsity
    from sparsify.evals.perplexity import perplexity
    from sparsify.training.finetune import substitute

    windows = texts.evaluation
    assert windows is not None
    view.note(f"measuring on {len(windows.tokens)} windows of {windows.name}")
    after = perplexity(model, windows).to_dict()
    found: dict[str, Any] = {"before": before, "after": after, "shift": None, "shifts": []}
    if settings.method == "dense":
        return found
    mlps = substitute(model)
    found |= _choose_shift(model, mlps, texts.shift, settings, view)
    for shift in dict.fromkeys((0.0, found["shift"])):
        point = ffn_sparsity(model, mlps, windows, shift)
        found["shifts"].append(asdict(point) | {"mean": point.mean})
    return found


def _choose_shift(
    model: "PreTrainedModel",
    mlps: "tuple[Mlp, ...]",
    tried: "Windows | None",
    settings: "FinetuneSettings",
    view: FinetuneView,
) -> dict[str, Any]:
    """Returns the shift, and what was measured of others where it is auto."""
    from sparsify.evals.ffn_sparsity import largest_shift

    if tried is None:
        return {"shift": float(settings.shift)}
    view.note(f"choosing the shift on {len(tried.tokens)} windows of {tried.name}")
    shift, points = largest_shift(model, mlps, tried, settings.shift_rise)
    return {"shift": shift, "shift_search": [asdict(point) | {"mean": point.mean} for point in points]}


def convert_finetuned(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    calibration: "Calibration",
    out: Path,
    spec: str,
    shift: float,
    settings: "FinetuneSettings",
) -> dict[str, Any]:
    """Converts in place, writes the sparse checkpoint with the shift as its cut, and returns its ledger's totals."""
    from sparsify import checkpoint
    from sparsify.cli.ledger_view import ledger_totals
    from sparsify.conversion import convert
    from sparsify.ledger import ledger_of
    from sparsify.methods.relu import Relu

    convert(model, Relu(cut=shift), calibration)
    said = f"finetuned with method {settings.method}; how, is in the plain checkpoint's training.json"
    checkpoint.save(model, out, tokenizer, source=spec, relufied=said)
    return ledger_totals(ledger_of(model))
