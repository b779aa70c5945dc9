"""`sparsify bench`: tokens per second while decoding, dense against sparse in turns."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparsify.cli.loading import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    Loaded,
    PrefillOption,
    TrustOption,
    load,
)
from sparsify.cli.output import Format, FormatOption, Output, SaveOption, byte_count, make_table, percent
from sparsify.cli.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("bench", rich_help_panel="Make and measure")(bench)


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A converted checkpoint, or a dense model.")],
    new_tokens: Annotated[int, typer.Option(help="Decoded tokens in a round.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of dense and sparse in turn.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    prefill: PrefillOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    backend: BackendOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Measure decoding speed, dense and sparse interleaved in one run.

    Gives the median and spread of the time a token takes, the weight bytes it
    touches by the ledger, and says so plainly where dense is faster.

    [dim]$[/] sparsify bench reference-50
    """
    output = Output(format, save)
    with output.working(), Progress() as progress:
        from sparsify.evals.speed import decode_speed

        loaded = load(
            model, progress, dtype=dtype, device=device, backend=backend, prefill=prefill,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        prompt = _prompt(loaded, prompt_tokens, batch_size)
        stage = progress.stage("rounds")
        speed = decode_speed(loaded.model, prompt, new_tokens=new_tokens, rounds=rounds, progress=stage)
    result: dict[str, Any] = {"model": model} | speed.to_dict()
    result["statement"] = statement(result) if result["ratio"] is not None else None
    output.emit(result, lambda console: _render(console, result))


def statement(speed: dict[str, Any]) -> str:
    """Returns in one sentence which side is faster, and why sparse is not where it is not."""
    ratio = speed["ratio"]
    if ratio["p10"] > 1.0:
        return f"Sparse is faster here: {ratio['median']:.2f}× dense's tokens per second."
    slower = ratio["p90"] < 1.0
    said = (
        f"Dense is faster here: sparse reaches {ratio['median']:.2f}× dense's tokens per second"
        if slower
        else f"No clear difference here: {ratio['median']:.2f}×, within the spread of the rounds"
    )
    if speed["backends"] == ["reference"]:
        return f"{said}: the reference backend masks the input but reads every weight byte; native kernels come next."
    return f"{said}."


def _prompt(loaded: Loaded, tokens: int, batch: int) -> "Tensor":
    """Returns token ids [B, P] of the standard library's evaluation text."""
    from sparsify.text import read_text, windows

    return windows(read_text("stdlib:evaluation"), loaded.tokenizer, seq_len=tokens, limit=batch).tokens


def _render(console: Console, result: dict[str, Any]) -> None:
    table = make_table("Decoding", "", "tokens/s", "ms/token", "p10 to p90", "weights/token", "effective", left=1)
    for name in ("dense", "sparse"):
        side = result[name]
        if side is None:
            continue
        step = side["ms_per_step"]
        spread = f"{step['p10']:.2f} to {step['p90']:.2f}"
        table.add_row(
            name, f"{side['tokens_per_second']:.1f}", f"{step['median']:.2f}", spread,
            byte_count(side["bytes_per_token"]), f"{side['gb_per_second']:.2f} GB/s",
        )  # fmt: skip
    console.print(table)
    if result["ratio"] is not None:
        ratio = result["ratio"]
        console.print(
            f"Sparse to dense speed: {ratio['median']:.2f}× (p10 {ratio['p10']:.2f}, p90 {ratio['p90']:.2f} by round), "
            f"realised sparsity {percent(result['realised_sparsity'])}."
        )
        console.print(f"[bold]{result['statement']}[/]")
    backend = f", backend {', '.join(result['backends'])}" if result["backends"] else ""
    console.print(
        f"{result['device']}, {result['threads']} threads, {result['dtype']}{backend}, "
        f"batch {result['batch']}, prompt {result['prompt_tokens']}, {result['rounds']} rounds of "
        f"{result['new_tokens']} tokens; a plain copy here moves {result['copy_gb_per_second']:.1f} GB/s. "
        f"{result['protocol']}.",
        style="dim",
        markup=False,
    )
