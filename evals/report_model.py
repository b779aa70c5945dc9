"""The section of a report about the model: what it is, how it was made, and what identifies it."""

from collections.abc import Iterator

from sparsify.config import SparsifyConfig
from sparsify.evals.report_page import Grid, Part
from sparsify.evals.report_results import Results, Subject
from sparsify.evals.report_text import NONE, settings, share, size
from sparsify.manifest import MANIFEST

_ARCHITECTURE = (
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "dtype",
)  # fmt: skip


def model_part(subject: Subject, results: Results) -> Part:
    """Returns the section."""
    config, ledger = subject.config, subject.ledger
    part = Part("model", "Model")
    whole = ledger.dense_bytes + ledger.rest_bytes
    part.blocks = [
        f"Made from {subject.source} by {config.method}: of the {size(whole)} of weights that a token touches in the "
        f"dense model it touches {size(ledger.touched_bytes + ledger.rest_bytes)}.",
        "Nominal sparsity is what was asked for; weighted what the byte ledger holds; realised what some text had.",
        *results.notes,
        Grid("What it is and how it was made", ("", ""), list(_facts(subject)), left=2),
        Grid(
            "sparsify.yaml, every setting of the conversion", ("setting", "value"), list(_yaml(subject)), 2, folded=True
        ),
    ]
    return part


def budget(config: SparsifyConfig, values: dict[str, object]) -> str:
    """Returns how the budget was given."""
    for name, words in (("max_ppl_increase", "a rise of perplexity within"), ("speedup", "a speed-up of")):
        if values.get(name) is not None:
            return f"{words} {values[name]}, which gave {share(config.sparsity)} of the converted linears' bytes"
    return f"{share(config.sparsity)} of the converted linears' bytes"


def _facts(subject: Subject) -> Iterator[tuple[str, str]]:
    config, ledger = subject.config, subject.ledger
    calibration, text = config.calibration, subject.architecture.get("text_config") or {}
    known = {name: (text if name in text else subject.architecture).get(name) for name in _ARCHITECTURE}
    yield "folder", subject.folder.resolve().name
    yield "dense model", subject.source
    yield "architecture", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in known.items() if v is not None) or NONE
    yield "method", config.method
    yield "its options", settings(config.method_config)
    yield "allocation", config.allocation
    yield "budget", budget(config, subject.settings)
    yield "rotated", "yes, into principal components before the conversion" if config.rotated else "no"
    if config.neurons is not None:
        yield "neurons", f"chosen by {config.neurons.cut} in {len(config.neurons.mlps)} MLPs"
    compensated = sum(bool(entry.compensated) for entry in config.linears.values())
    yield "compensated linears", f"{compensated} of {len(config.linears)}"
    yield "prefill", config.prefill
    yield (
        "calibration",
        f"{calibration.sequences} × {calibration.seq_len} tokens of {calibration.source}, token ids sha256 "
        f"{calibration.sha256}",
    )
    yield "nominal sparsity", share(config.sparsity)
    yield "weighted sparsity", f"{share(ledger.weighted_sparsity, 2)} of the {len(config.linears)} converted linears"
    yield "whole-model sparsity", f"{share(ledger.model_sparsity, 2)} of all weights that a token touches"
    for statement in config.left_dense:
        yield "left dense", statement
    yield "sparsify", f"{config.sparsify_version}, schema {config.schema_version}"
    yield "transformers", str(subject.architecture.get("transformers_version", NONE))
    yield "checkpoint sha256", f"{subject.sha256 or 'none: ' + MANIFEST + ' is missing'} (of the manifest but the card)"


def _yaml(subject: Subject) -> Iterator[tuple[str, str]]:
    for name, value in subject.settings.items():
        yield str(name), NONE if value is None else str(value)
