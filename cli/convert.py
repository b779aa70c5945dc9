"""`sparsify convert`: a dense model in, a sparse checkpoint out."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from sparsify.cli.budgets import BUDGETS, DEFAULT_HELD_OUT, DEFAULT_SPARSITY, print_budget
from sparsify.cli.conversion import run_conversion
from sparsify.cli.ledger_view import print_left_dense, totals_table
from sparsify.cli.output import Format, FormatOption, Output, SaveOption, percent, seconds
from sparsify.cli.plan_view import render_plan
from sparsify.cli.planning import plan_settings
from sparsify.cli.progress import Progress
from sparsify.cli.relufy_conversion import said_of
from sparsify.cli.settings import ConvertSettings, parse_rho
from sparsify.cli.stream_conversion import run_streamed

_DEFAULTS = ConvertSettings()


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("convert", rich_help_panel="Make and measure")(convert)


def convert(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A folder, a hub id, an alias such as llama-3-8b, or reference."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write; it must not exist.", metavar="DIR")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="See `sparsify methods`; relufy puts ReLU in first.", show_default=_DEFAULTS.method),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of the linears' bytes that a token must not touch, in [0, 1).",
            show_default=str(DEFAULT_SPARSITY),
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            help="Instead of --sparsity: the sparsest model whose perplexity on held-out calibration text rises by at "
            "most this, such as 1% or 0.01.",
            metavar="SHARE",
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            help="Instead of --sparsity: the sparsity that should decode this many times as fast as the best dense "
            "way, by costs measured on this machine."
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            help="Windows of held-out text for --max-ppl-increase.",
            show_default=str(DEFAULT_HELD_OUT),
        ),
    ] = None,
    cost_table: Annotated[
        str | None,
        typer.Option(
            help="For --speedup: costs measured before; where the file is not there they are measured and written.",
            metavar="FILE",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How the budget is spent over the linears: uniform, greedy (TEAL's), larosa (a fixed split), "
            "sensitivity (by gradients) or evolutionary (R-Sparse's search).",
            show_default="sensitivity for auto, larosa for larosa, else uniform",
        ),
    ] = None,
    allocation_state: Annotated[
        str | None,
        typer.Option(
            help="evolutionary: a file that it is written to after each generation; with the same file it goes on.",
            metavar="FILE",
        ),
    ] = None,
    rho: Annotated[
        str | None,
        typer.Option(
            help="rsparse: share of the budget for channels, in [0, 1], the rest for low rank; auto picks it for "
            "each linear by calibration error.",
            show_default="auto",
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="rsparse: column-norm, magnitude, residual-norm, published-code, or auto, the best for each linear.",
            show_default="column-norm",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="rsparse: a file of sparsity and rho for each linear.", metavar="FILE")
    ] = None,
    svd: Annotated[
        str | None,
        typer.Option(
            help="rsparse, auto: how low-rank factors are computed: exact, randomised, or auto, which is exact for "
            "small weights and for ranks above a third of their smaller side.",
            show_default="auto",
        ),
    ] = None,
    compensate: Annotated[
        bool | None,
        typer.Option("--compensate", help="Give the mean of what is dropped back as a bias, paid from the budget."),
    ] = None,
    cut: Annotated[
        float | None,
        typer.Option(
            help="relu: activations up to this one are 0, too (FATReLU), in the activation's own units.",
            show_default="0, which loses nothing",
        ),
    ] = None,
    cett: Annotated[
        float | None,
        typer.Option(
            help="relu: in the place of --cut, the share of each MLP's output that its cut may drop, in [0, 1).",
            metavar="SHARE",
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="relufy: what takes the activation's place: relu, relu2, fatrelu, shifted_relu, drelu, polyrelu, "
            "polynorm or crrelu.",
            show_default="relu",
        ),
    ] = None,
    after_norms: Annotated[
        bool | None, typer.Option("--after-norms", help="relufy: ReLU after the norms, too (stage 2).")
    ] = None,
    zeros: Annotated[
        float | None,
        typer.Option(
            help="relufy: share of zeros that shifted_relu is to leave.",
            metavar="SHARE",
            show_default="the shift of least error",
        ),
    ] = None,
    reconstruct: Annotated[
        int | None,
        typer.Option(
            help="relufy: fit each MLP to its dense outputs in that many passes over the calibration text.",
            show_default="0, the swap alone",
        ),
    ] = None,
    reconstruct_inputs: Annotated[
        str | None,
        typer.Option(help="Of the model whose earlier MLPs are converted, or dense.", show_default="converted"),
    ] = None,
    reconstruct_weighting: Annotated[
        str | None,
        typer.Option(help="plain, or hessian: outputs count as the prediction depends on them.", show_default="plain"),
    ] = None,
    reconstruct_zeros: Annotated[
        float | None,
        typer.Option(help="Weight of small activations beside the error: more leaves more zeros.", show_default="0"),
    ] = None,
    reconstruct_state: Annotated[
        str | None,
        typer.Option(
            help="A folder that keeps each fitted MLP; with the same one a stopped fit goes on.", metavar="DIR"
        ),
    ] = None,
    plain: Annotated[
        bool | None, typer.Option("--plain", help="relufy: write a dense checkpoint, without sparse layers.")
    ] = None,
    rotation: Annotated[
        str | None,
        typer.Option(help="larosa: model, one for all, or layer, one for each input.", show_default="model"),
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate", help="Rotate the model into its principal components first: the same function, new weights."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on: a .txt or .jsonl file, hf:DATASET:CONFIG:SPLIT, wikitext2 or "
            "stdlib:calibration.",
            metavar="TEXT",
            show_default=_DEFAULTS.calibration,
        ),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Calibration windows.", show_default=str(_DEFAULTS.sequences))
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a window.", show_default=str(_DEFAULTS.seq_len))
    ] = None,
    prefill: Annotated[
        Literal["sparse", "dense"] | None,
        typer.Option(help="How the checkpoint runs prompts.", show_default="sparse; dense for griffin, which needs it"),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="auto (the model's own), float32, bfloat16 or float16.", metavar="DTYPE", show_default=_DEFAULTS.dtype
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to convert, such as cpu or cuda:0.", show_default="a GPU if there is one")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For whatever is random.", show_default=str(_DEFAULTS.seed))] = None,
    eval_windows: Annotated[
        int | None,
        typer.Option(
            help="Windows to measure dense and sparse on for the model card; 0 for none.",
            show_default=str(_DEFAULTS.eval_windows),
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with any of these settings; flags win over it.", metavar="FILE")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Convert one decoder block at a time, for a model larger than memory: the same files, and what is "
            "finished is kept in .NAME.partial beside --out.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a --stream conversion that was stopped, from its last block.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the plan, as `sparsify plan` does: no weight is read."),
    ] = False,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Convert a dense model to a sparse checkpoint.

    Calibrates on text, splits each linear's byte budget, and writes a standard
    Hugging Face folder that other tools load as the dense model it also is.
    The settings are in it as sparsify.yaml: --config DIR/sparsify.yaml repeats
    the conversion.

    [dim]$[/] sparsify convert reference --sparsity 0.5 --out reference-50
    [dim]$[/] sparsify convert reference --max-ppl-increase 1% --out reference-1pc
    [dim]$[/] sparsify convert llama-3-8b --method rsparse --rho 0.95 --calibration wikitext2 --out l3-50
    """
    given = {
        "model": model, "out": out, "method": method, "sparsity": sparsity, "max_ppl_increase": max_ppl_increase,
        "speedup": speedup, "held_out": held_out, "cost_table": cost_table, "allocation": allocation,
        "allocation_state": allocation_state, "rho": parse_rho(rho), "score": score, "recipe": recipe,
        "svd": svd, "compensate": compensate, "cut": cut, "cett": cett, "activation": activation,
        "after_norms": after_norms, "zeros": zeros,
        "reconstruct": reconstruct, "reconstruct_inputs": reconstruct_inputs,
        "reconstruct_weighting": reconstruct_weighting, "reconstruct_zeros": reconstruct_zeros,
        "reconstruct_state": reconstruct_state, "plain": plain, "rotation": rotation, "rotate": rotate,
        "calibration": calibration, "sequences": sequences, "seq_len": seq_len, "prefill": prefill,
        "dtype": dtype, "device": device, "seed": seed, "eval_windows": eval_windows,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    output = Output(format, save)
    base = ConvertSettings.from_yaml(config) if config is not None else _DEFAULTS
    flags = {name: value for name, value in given.items() if value is not None}
    if any(name in flags for name in BUDGETS):
        # A budget among the flags takes the place of the file's, whichever that is.
        base = base.updated(dict.fromkeys(BUDGETS), source="flags")
    settings = base.updated(flags, source="flags")
    with output.working(), Progress() as progress:
        if dry_run:
            result = plan_settings(settings, progress, stream=stream or resume)
        elif stream or resume:
            result = run_streamed(settings, progress, resume=resume)
        else:
            result = run_conversion(settings, progress)
    if dry_run:
        output.emit(result, lambda console: render_plan(console, result))
        if not result["verdict"]["fits"]:
            raise typer.Exit(1)
        return
    output.emit(result, lambda console: _render(console, result))


def _render(console: Console, result: dict[str, Any]) -> None:
    if result["relufied"] is not None:
        console.print(f"{said_of(result['relufied'])}.", markup=False)
    if result["ledger"] is None:
        console.print(f"[bold]Wrote {escape(result['out'])}[/] in {seconds(result['seconds'])}.")
        return
    console.print(totals_table(result["ledger"]))
    print_left_dense(console, result["ledger"]["left_dense"])
    about = result["calibration"]
    allocation = "" if result["allocation"] == "uniform" else f", allocation {result['allocation']}"
    nominal = result["ledger"]["nominal_sparsity"]
    # The zeros of relu by itself are not asked for.
    share = "" if result["method"] == "relu" else f" at {percent(nominal)}"
    worst = result["worst_error"]
    console.print(
        f"{result['method']}{share}{allocation}, calibrated on "
        f"{about['sequences']} × {about['seq_len']} tokens of {about['source']}. Low rank pays in "
        f"{result['low_rank_linears']} of {result['ledger']['linears']} linears. Output error: mean "
        f"{percent(result['mean_error'])}, worst {percent(worst['error'])} ({worst['linear']}).",
        markup=False,
    )
    if (svd := result["svd"]) is not None:
        console.print(
            f"Factors of {svd['randomised']} linears are of a randomised SVD: of their weights they leave "
            f"{percent(svd['mean_error'])} (the norm of W − L by that of W), at worst "
            f"{percent(svd['worst_error']['error'])} ({svd['worst_error']['linear']}).",
            markup=False,
        )
    print_budget(console, result["budget"])
    measured = result["measured"]
    if measured is not None:
        dense, sparse = measured["dense"], measured["sparse"]
        which = "every token" if sparse["protocol"] == "every-token" else "the tokens after a dense first half"
        console.print(
            f"Perplexity on {dense['windows']} × {dense['seq_len']} tokens of {dense['text']}, {which} sparse: "
            f"dense {dense['perplexity']:.3f}, sparse {sparse['perplexity']:.3f}, realised sparsity "
            f"{percent(measured['realised_sparsity'])}.",
            markup=False,
        )
    console.print(f"[bold]Wrote {escape(result['out'])}[/] in {seconds(result['seconds'])}.")
