"""`sparsify bench`: the time of a decoded token, sparse and every dense way to run the same weights, in turns."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.cli.bench_view import render_crossover, render_speed, statements
from sparsify.cli.loading import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    PrefillOption,
    TrustOption,
    identify,
    load,
    pick_device,
)
from sparsify.cli.output import Format, FormatOption, Output, SaveOption
from sparsify.cli.progress import Progress
from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsify.evals.random_subject import Subject

_SPARSITY, _METHOD = 0.5, "teal"
# Tokens whose activations are recorded for the crossover.
_WINDOWS, _WINDOW = 8, 64


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("bench", rich_help_panel="Make and measure")(bench)


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A converted checkpoint, or a dense model.", show_default=False),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Instead of MODEL: a real model's shape with random weights, such as tinyllama-1.1b."),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="For --shape; with teal any number of them.", show_default=str(_SPARSITY)),
    ] = None,
    method: Annotated[str | None, typer.Option(help="For --shape.", show_default=_METHOD)] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Measured steps in a round.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all sides in turn.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    no_hf: Annotated[
        bool, typer.Option("--no-hf", help="Do not load the dense weights once more for transformers' own decode.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also compile transformers' decode; takes minutes.")
    ] = False,
    crossover: Annotated[
        bool, typer.Option("--crossover", help="Instead: where dense is faster, by tokens at once and sparsity.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw it: .png, .svg or .pdf; needs matplotlib.")
    ] = None,
    prefill: PrefillOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    backend: BackendOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Measure decoding speed, sparse and dense in turns in one run.

    Dense is the same weights with sparsity off, transformers' own decode of
    them, and with --compiled that compiled; the ratio that counts is to the
    fastest. A measured memory stream says what the machine could do.

    [dim]$[/] sparsify bench reference-50
    [dim]$[/] sparsify bench --shape tinyllama-1.1b --sparsity 0.5 --sparsity 0.7
    """
    output = Output(format, save)
    _check(model, shape, sparsity, method, plot, crossover=crossover)
    lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch_size}
    with output.working(), Progress() as progress:
        if shape is not None:
            progress.note(f"making {shape} with random weights")
            subject = _shape(shape, sparsity, method, dtype, device, backend, prefill, **lengths)
        else:
            subject = _model(
                str(model), progress, crossover=crossover, dtype=dtype, device=device, backend=backend, prefill=prefill,
                trust_remote_code=trust_remote_code, **lengths,
            )  # fmt: skip
        result = _about(subject, model, shape)
        if crossover:
            result |= _crossover(subject, progress)
        else:
            result |= _speed(subject, progress, prompt_tokens, rounds, no_hf=no_hf, compiled=compiled)
            result["statement"] = " ".join(statements(result)) or None
    if plot is not None:
        from sparsify.evals.speed_plot import save_plot

        save_plot(result, plot)
    output.emit(result, lambda console: (render_crossover if crossover else render_speed)(console, result))


def _check(
    model: str | None,
    shape: str | None,
    sparsity: list[float] | None,
    method: str | None,
    plot: Path | None,
    *,
    crossover: bool,
) -> None:
    """Raises SparsifyError for options that do not belong together, before anything is loaded."""
    if (model is None) == (shape is None):
        raise SparsifyError("give a MODEL, or --shape NAME for random weights in a real model's shape, and not both")
    for name, value in (("--sparsity", sparsity), ("--method", method)):
        if value and model is not None:
            raise SparsifyError(f"{name} is for --shape: {model} is measured as it was converted")
    if plot is not None:
        from sparsify.evals.speed_plot import check_plot

        if crossover:
            raise SparsifyError("--plot draws the sides of a decode: leave it or --crossover out")
        check_plot(plot)


def _shape(
    name: str,
    sparsity: list[float] | None,
    method: str | None,
    dtype: str,
    device: str | None,
    backend: str | None,
    prefill: str | None,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
) -> "Subject":
    from sparsify.evals.decoding import WARM_UP_STEPS
    from sparsify.evals.random_subject import random_subject
    from sparsify.runtime import set_prefill, sparse_layers

    subject = random_subject(
        name,
        sparsities=sparsity or [_SPARSITY],
        method=method or _METHOD,
        dtype=dtype,
        prompt_tokens=prompt_tokens,
        length=prompt_tokens + WARM_UP_STEPS + new_tokens,
        batch=batch,
        device=pick_device(device),
    )
    for layer in sparse_layers(subject.model).values() if backend is not None else ():
        layer.bind(backend)
    if prefill is not None:
        set_prefill(subject.model, prefill)
    return subject


def _model(
    spec: str,
    progress: Progress,
    *,
    crossover: bool,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    dtype: str,
    device: str | None,
    backend: str | None,
    prefill: str | None,
    trust_remote_code: bool,
) -> "Subject":
    """Returns a loaded model with tokens of the standard library's evaluation text."""
    from sparsify.evals.decoding import WARM_UP_STEPS
    from sparsify.evals.random_subject import Subject
    from sparsify.models import load_dense
    from sparsify.text import read_text, windows

    loaded = load(
        spec, progress, dtype=dtype, device=device, backend=backend, prefill=prefill,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    length, limit = (_WINDOW, _WINDOWS) if crossover else (prompt_tokens + WARM_UP_STEPS + new_tokens, batch)
    tokens = windows(read_text("stdlib:evaluation"), loaded.tokenizer, seq_len=length, limit=limit).tokens

    def dense() -> "PreTrainedModel":
        where = str(loaded.model.device)
        return load_dense(spec, dtype=dtype, device=where, trust_remote_code=trust_remote_code)

    return Subject(loaded.model, tokens, None, dense)


def _about(subject: "Subject", model: str | None, shape: str | None) -> dict[str, Any]:
    config = getattr(subject.model.config, "quantization_config", None)
    method = getattr(config, "method", None)
    return {
        "title": f"{Path(str(model)).name if shape is None else f'{shape}, random weights'}, {method or 'dense'}",
        "model": model,
        "shape": shape,
        "random_weights": shape is not None,
        "method": method,
        "checkpoint_sha256": identify(subject.model) if shape is None else None,
    }


def _speed(
    subject: "Subject", progress: Progress, prompt_tokens: int, rounds: int, *, no_hf: bool, compiled: bool
) -> dict[str, Any]:
    from sparsify.evals.sides import dense_copy
    from sparsify.evals.speed import decode_speed
    from sparsify.runtime import sparse_layers

    rows, reason = None, "--no-hf"
    if sparse_layers(subject.model) and not no_hf:
        progress.note("loading the dense weights once more, row-major")
        rows, reason = dense_copy(subject.model, subject.dense)
    progress.note("first runs of all sides" + (", with compilation" if compiled else ""))
    speed = decode_speed(
        subject.model, subject.tokens, prompt_tokens=prompt_tokens, rounds=rounds, rows=rows, compiled=compiled,
        thresholds=subject.thresholds, progress=progress.stage("rounds"),
    ).to_dict()  # fmt: skip
    if sparse_layers(subject.model) and rows is None:
        names = ["transformers", *(["compiled"] if compiled else [])]
        speed["left_out"] |= dict.fromkeys(names, reason)
    return speed


def _crossover(subject: "Subject", progress: Progress) -> dict[str, Any]:
    from sparsify.evals.crossover import crossover

    return crossover(subject.model, subject.tokens, progress=progress.stage("crossover")).to_dict()
