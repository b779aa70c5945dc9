"""The model card of a converted checkpoint: what it is, how it was made, what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify.config import SparsifyConfig
from sparsify.errors import CheckpointError
from sparsify.ledger import Ledger

_BEGIN, _END = "<!-- sparsify report: begin -->", "<!-- sparsify report: end -->"


def render_card(
    config: SparsifyConfig,
    ledger: Ledger,
    *,
    source: str,
    measured: Mapping[str, Mapping[str, Any]] | None,
    budget: str | None = None,
    relufied: str | None = None,
) -> str:
    """Returns README.md: front matter, the byte ledger's totals, and a table {row: {column: value}} of measurements."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [sparsify, activation-sparsity]",
        *([f"base_model: {source}"] if "/" in source and not source.startswith(("/", ".")) else []),
        "---",
        # The zeros of relu by itself are not asked for.
        f"# {source}, {config.method}" + ("" if config.method == "relu" else f" at {config.sparsity:.0%}"),
        "",
        "Activation-sparse: each token uses the weight columns that matter for it. Made by sparsify "
        f"{config.sparsify_version} from `{source}`; {_weights(config, relufied)}, so without sparsify this folder "
        f"loads as the dense {'ReLU model' if relufied else 'model'}.",
        "",
        "```python",
        "import sparsify  # pip install sparsify-llm",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| method | {config.method} ({_options(config)}) |",
        *([f"| budget | {budget} |"] if budget else []),
        *([f"| ReLU-fication | {relufied} |"] if relufied else []),
        f"| nominal sparsity | {config.sparsity:.1%} |",
        f"| weighted sparsity (weight bytes of converted linears) | {ledger.weighted_sparsity:.2%} |",
        f"| whole-model sparsity (all weight bytes of a token) | {ledger.model_sparsity:.2%} |",
        f"| bytes of converted linears per token | {ledger.touched_bytes:,.0f} of {ledger.dense_bytes:,} |",
        f"| calibration | {config.calibration.sequences} × {config.calibration.seq_len} tokens of "
        f"{config.calibration.source} |",
        *[f"| left dense | {statement} |" for statement in ledger.left_dense],
        "",
        "## Measured",
        "",
        *(_table(measured) if measured else ["Nothing was measured when this checkpoint was written."]),
        "",
    ]
    return "\n".join(lines)


def with_results(card: str, results: Sequence[tuple[str, str]], commands: Sequence[str]) -> str:
    """Returns the card with a section of (what, value) results and the commands that measure them again.

    The section stands between two comments; the one of an earlier call is replaced, all else stays as it is.
    """
    section = [
        _BEGIN,
        "## Results",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_field(what)} | {_field(value)} |" for what, value in results),
        "",
        "Measured again by:",
        "",
        "```",
        *(" ".join(command.split()) for command in commands),
        "```",
        _END,
    ]
    kept, begin, rest = card.partition(_BEGIN)
    if begin:
        _, end, after = rest.partition(_END)
        if not end:
            raise CheckpointError(f"the card has {_BEGIN!r} and no {_END!r} after it: put it back, or remove both")
        return kept + "\n".join(section) + after
    return card.rstrip("\n") + "\n\n" + "\n".join(section) + "\n"


def _field(text: str) -> str:
    """Returns text as one field of a table: no line ends, no bars, no tags."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _weights(config: SparsifyConfig, relufied: str | None) -> str:
    if relufied:
        return "its MLPs have ReLU now"
    if config.rotated:
        return "the dense weights were rotated, which changes what they compute by rounding only"
    return "the dense weights are unchanged"


def _options(config: SparsifyConfig) -> str:
    options = {key: value for key, value in config.method_config.items() if key != "sparsity" and value is not None}
    shown = {key: "given per linear" if isinstance(value, Mapping) else value for key, value in options.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items()) or "no options"


def _table(measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in measured.values() for key in row))
    rows = [f"| {name} | " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for name, row in measured.items()]
    return ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", *rows]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
