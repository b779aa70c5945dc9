"""`sparsify measure`: PPL-p% sparsity of a dense model, and the sparse checkpoint that has it."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparsify.cli.conversion import check_out
from sparsify.cli.loading import DeviceOption, DtypeOption, TrustOption, made_from, pick_device
from sparsify.cli.measure_view import print_ppl_p
from sparsify.cli.output import Format, FormatOption, Output, SaveOption
from sparsify.cli.progress import Progress
from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsify.evals.ppl_p_result import Point, PplP
    from sparsify.text import Text, Windows

_LONGEST = 2048


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("measure", rich_help_panel="Make and measure")(measure)


def measure(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a hub id, an alias or reference.", show_default=False)
    ],
    ppl_p: Annotated[
        str, typer.Option("--ppl-p", metavar="P,...", help="Rises in perplexity to allow, such as 0.1%,1%,5%.")
    ] = "1%",
    rule: Annotated[
        str,
        typer.Option(
            help="What is dropped: cett, and for comparison top-k, fatrelu, zero; several with commas between.",
            metavar="RULE,...",
        ),
    ] = "cett",
    scope: Annotated[
        Literal["mlp", "linears"],
        typer.Option(help="mlp: the neurons of every MLP. linears: the input channels of every linear (ours)."),
    ] = "mlp",
    text: Annotated[
        str | None,
        typer.Option(
            help="What perplexity is measured on: a .txt or .jsonl file, hf:DATASET:CONFIG:SPLIT, wikitext2 or "
            "stdlib:evaluation.",
            show_default="as in eval",
        ),
    ] = None,
    cett_text: Annotated[
        str | None, typer.Option(help="What thresholds are fitted on.", show_default="the same windows")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a window.", show_default=f"{_LONGEST}, or the model's longest if less")
    ] = None,
    limit: Annotated[int, typer.Option(help="Windows of each text at most.")] = 32,
    padded: Annotated[
        bool,
        typer.Option("--padded", help="A window for each document, padded; pads count nowhere. Else no pads at all."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write the sparse checkpoint with these thresholds: one P, rule cett.", metavar="DIR"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.")] = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Measure PPL-p% sparsity: neurons that may go before perplexity rises by p%.

    Works for any activation (arXiv 2411.02335). Nothing is trained, and
    the model is not changed; --out writes the model that was measured.

    [dim]$[/] sparsify measure reference --ppl-p 0.1%,1%,5%
    [dim]$[/] sparsify measure reference --ppl-p 1% --cett-text stdlib:calibration --out reference-ppl1
    """
    output = Output(format, save)
    tolerances, rules = _parse_tolerances(ppl_p), _parse_rules(rule)
    _check_out(out, tolerances, rules)
    with output.working(), Progress() as progress:
        started = time.monotonic()
        from sparsify.models import load_tokenizer, resolve_model
        from sparsify.text import default_evaluation_text, read_text

        device = pick_device(device)
        resolve_model(model)
        source, why = (
            default_evaluation_text(made_from(model)) if text is None else (read_text(text), f"evaluation text: {text}")
        )
        progress.note(why)
        fitted = None if cett_text is None else read_text(cett_text)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        progress.note(f"loading {model}")
        loaded = _load(model, dtype, device, trust_remote_code)
        length = _longest(loaded) if seq_len is None else seq_len
        windows = _windows(source, tokenizer, length, limit, padded)
        cett_windows = windows if fitted is None else _windows(fitted, tokenizer, length, limit, padded)
        result, measured = _measure(loaded, windows, cett_windows, tolerances, rules, scope, batch_size, progress)
        settings = {
            "ppl_p": tolerances, "rule": rules, "scope": scope, "text": text, "cett_text": cett_text,
            "seq_len": length, "limit": limit, "padded": padded, "batch_size": batch_size, "dtype": dtype,
        }  # fmt: skip
        result = {"model": model, "text": why, "settings": settings} | result
        if out is not None:
            progress.note(f"writing {out}")
            _write(loaded, tokenizer, measured, measured.points[0], cett_windows, model, out)
            result["out"] = str(out)
        result["seconds"] = round(time.monotonic() - started, 1)
    output.emit(result, lambda console: print_ppl_p(console, result))


def _parse_tolerances(text: str) -> list[float]:
    """Returns 0.001 and 0.05 for "0.1%,5%", ascending."""
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", part)
        if match is None or float(match[1]) == 0.0:
            raise SparsifyError(
                f"--ppl-p {text}: {part.strip()!r} is not a rise in per cent above 0; write it as 1%, or several as "
                "0.1%,1%,5%"
            )
        found.add(float(match[1]) / 100)
    return sorted(found)


def _parse_rules(text: str) -> list[str]:
    from sparsify.evals.neuron_rules import check_rule

    return list(dict.fromkeys(check_rule(part.strip()) for part in text.split(",")))


def _check_out(out: Path | None, tolerances: list[float], rules: list[str]) -> None:
    if out is None:
        return
    if len(tolerances) != 1 or rules != ["cett"]:
        raise SparsifyError(
            f"--out {out} writes one model: give one --ppl-p and --rule cett, not {len(tolerances)} and "
            f"{', '.join(rules)}"
        )
    check_out(str(out))


def _load(model: str, dtype: str, device: str, trust_remote_code: bool) -> "PreTrainedModel":
    from sparsify.models import load_dense

    return load_dense(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def _longest(model: "PreTrainedModel") -> int:
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(_LONGEST, positions) if isinstance(positions, int) else _LONGEST


def _windows(text: "Text", tokenizer: "PreTrainedTokenizerBase", seq_len: int, limit: int, padded: bool) -> "Windows":
    from sparsify.evals.padded import document_windows
    from sparsify.text import windows

    if padded:
        return document_windows(text, tokenizer, seq_len=seq_len, limit=limit)
    return windows(text, tokenizer, seq_len=seq_len, limit=limit)


def _measure(
    model: "PreTrainedModel",
    windows: "Windows",
    cett_windows: "Windows",
    tolerances: list[float],
    rules: list[str],
    scope: str,
    batch_size: int,
    progress: Progress,
) -> "tuple[dict[str, Any], PplP]":
    from sparsify.evals.machine import environment
    from sparsify.evals.neurons import real_tokens
    from sparsify.evals.ppl_p import measure_ppl_p
    from sparsify.fingerprint import weights_sha256

    measured = measure_ppl_p(
        model, windows, p=tolerances, cett_windows=cett_windows, rules=rules, scope=scope, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    result = {
        "model_sha256": weights_sha256(model),
        "cett_text": {
            "text": cett_windows.name,
            "text_sha256": cett_windows.sha256,
            "windows": len(cett_windows.tokens),
            "seq_len": cett_windows.seq_len,
            "tokens": int(real_tokens(cett_windows).sum()),
        },
        "pads": int((~real_tokens(windows)).sum()),
        "environment": environment(model.device),
    }
    return result | measured.to_dict(), measured


def _write(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    measured: "PplP",
    point: "Point",
    cett_windows: "Windows",
    spec: str,
    out: Path,
) -> None:
    """Writes the model with the thresholds of one point: the model whose perplexity was measured."""
    from sparsify import models
    from sparsify.calibration import Calibration
    from sparsify.checkpoint import save
    from sparsify.evals.ppl_p import apply_point

    apply_point(model, point, scope=measured.scope, calibration=Calibration(cett_windows.tokens, cett_windows.name))
    rows = {
        "dense": {"perplexity": measured.dense.perplexity, "activation ratio": 1.0},
        "sparse": {"perplexity": point.perplexity, "activation ratio": point.activation_ratio},
    }
    about = {"text": measured.dense.text, "windows": f"{measured.dense.windows} × {measured.dense.seq_len}"}
    source = Path(spec).name if Path(spec).is_dir() else models.ALIASES.get(spec, spec)
    settings = {"model": spec, "method": "ppl-p"}
    save(model, out, tokenizer, source=source, settings=settings, measured={k: v | about for k, v in rows.items()})
