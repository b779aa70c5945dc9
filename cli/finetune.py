"""`sparsify finetune`: continued training that makes a model's activations sparse, or the baselines to compare with."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from sparsify.cli.finetune_run import run_finetune
from sparsify.cli.finetune_view import FinetuneView
from sparsify.cli.output import Format, FormatOption, Output, SaveOption, make_table, percent, seconds
from sparsify.cli.settings import parse_rho
from sparsify.errors import SparsifyError
from sparsify.launch import launched_index


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("finetune", rich_help_panel="Make and measure")(finetune)


def finetune(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A folder, a hub id, an alias such as llama-3-8b, or reference."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write; it must not exist.", metavar="DIR")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="prosparse: ReLU and the L1 term; relu: ReLU alone; dense: the model as it is.",
            show_default="prosparse",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to train on: a .txt or .jsonl file, hf:DATASET:CONFIG:SPLIT:FIELD, stdlib:library.",
            metavar="TEXT",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Settings that come with the package: prosparse-7b, prosparse-13b, budget, reference."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Train on that many, such as 2M; the stages are scaled to it.",
            show_default="the schedule's own steps",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="The same as a number of steps.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="The schedule of λ as STEP:FACTOR,...: the step that each stage ends at, and its factor.",
            metavar="LIST",
            show_default="the paper's for 7B",
        ),
    ] = None,
    peak: Annotated[float | None, typer.Option(help="Scale the factors so that the last one is this.")] = None,
    l1_reduction: Annotated[
        Literal["mean", "sum"] | None,
        typer.Option(help="L1 over a token's neurons: their mean or their sum.", show_default="mean"),
    ] = None,
    shift: Annotated[
        str | None,
        typer.Option(
            help="FATReLU's t, measured in the end and cut in --sparse-out; auto: the largest that raises the "
            "perplexity on the calibration text by at most 0.5%.",
            show_default="0.01",
        ),
    ] = None,
    sparse_out: Annotated[
        str | None, typer.Option(help="Also convert the result with method relu, to here.", metavar="DIR")
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            help="The folder of checkpoints and event files; with the same one a stopped run goes on.",
            metavar="DIR",
            show_default="OUT.state",
        ),
    ] = None,
    distillation: Annotated[
        float | None, typer.Option(help="Weight of the KL to a teacher, in [0, 1].", show_default="0")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Whose logits are learnt.", metavar="MODEL", show_default="MODEL as it was"),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a window.", show_default="4096")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows in a forward of one process.", show_default="8")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forwards in a step.", show_default="1")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its highest.", show_default="3e-5")] = None,
    precision: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of products; weights are fp32.", show_default="bf16")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train LoRA of this rank in the place of the weights.", show_default="0, none")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps.", show_default="500")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps.", show_default="10, fewer in short runs")] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(help="Text to measure on.", metavar="TEXT", show_default="wikitext2; reference has its own"),
    ] = None,
    eval_windows: Annotated[int | None, typer.Option(help="Windows of it; 0 for none.", show_default="32")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text for the ledger of --sparse-out.", metavar="TEXT", show_default="stdlib:calibration"),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the result.", metavar="DTYPE", show_default="auto, the model's own"),
    ] = None,
    device: Annotated[
        Literal["cpu"] | None,
        typer.Option(help="cpu, where there is a GPU that is not to be used.", show_default="accelerate's"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For whatever is random.", show_default="0")] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with any of these settings and more; flags win over it.", metavar="FILE")
    ] = None,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Train a model on, so that its MLPs have more zeros.

    ReLU takes the activation's place, an L1 term that grows in stages pulls what
    enters the down projections to 0 (ProSparse), and a cut is measured in the end.
    transformers' Trainer does the training: several GPUs by `accelerate launch -m
    sparsify.cli.main finetune ...`. The same command goes on where it was stopped.

    [dim]$[/] sparsify finetune reference --recipe reference --out reference-prosparse
    [dim]$[/] sparsify finetune llama-2-7b --recipe prosparse-7b --text hf:allenai/c4:en --out prosparse-7b
    [dim]$[/] sparsify finetune reference --recipe reference --method dense --out reference-dense
    """
    from sparsify.strict import read_settings
    from sparsify.training.settings import FinetuneSettings, check_method, read_recipe

    given = {
        "model": model, "out": out, "method": method, "text": text, "tokens": tokens, "steps": steps, "peak": peak,
        "l1_reduction": l1_reduction, "shift": parse_rho(shift), "sparse_out": sparse_out, "state": state,
        "distillation": distillation, "teacher": teacher, "context": context, "batch": batch,
        "accumulation": accumulation, "learning_rate": learning_rate, "precision": precision,
        "gradient_checkpointing": gradient_checkpointing, "lora_rank": lora_rank,
        "checkpoint_every": checkpoint_every, "log_every": log_every, "evaluation": evaluation,
        "eval_windows": eval_windows, "calibration": calibration, "dtype": dtype, "device": device, "seed": seed,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    output = Output(format, save)
    flags = {name: value for name, value in given.items() if value is not None} | _parse_stages(stages)
    if method is not None:
        check_method(method)
    values: dict[str, Any] = {} if recipe is None else read_recipe(recipe)
    for more in ({} if config is None else read_settings(config), flags):
        if "tokens" in more or "steps" in more:
            # One of the two takes the place of what came before, whichever that was.
            values = {name: value for name, value in values.items() if name not in ("tokens", "steps")}
        values |= more
    settings = FinetuneSettings().updated(values, source="settings")
    with output.working(), FinetuneView(quiet=launched_index() > 0) as view:
        result = run_finetune(settings, view)
    if result is not None:
        output.emit(result, lambda console: _render(console, result))


def _parse_stages(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    pairs = [part.partition(":") for part in text.split(",")]
    try:
        return {
            "stage_ends": [int(end) for end, _, _ in pairs],
            "factors": [float(factor) for _, _, factor in pairs],
        }
    except ValueError:
        raise SparsifyError(
            f"--stages {text!r} is not of the form STEP:FACTOR,STEP:FACTOR, such as 5000:0,6000:0.005,10000:0.05"
        ) from None


def _render(console: Console, result: dict[str, Any]) -> None:
    measured = result["measured"]
    if measured is not None:
        about = measured["before"]
        shown = make_table(
            f"{escape(result['model'])}, {result['method']}, {result['tokens']:,} tokens", "", "perplexity", "zeros"
        )
        shown.add_row("before", f"{about['perplexity']:.3f}", "-")
        for point in measured["shifts"]:
            name = "after" if point["shift"] == 0.0 else f"after, cut {point['shift']:g}"
            shown.add_row(name, f"{point['perplexity']:.3f}", percent(point["mean"]))
        if not measured["shifts"]:
            shown.add_row("after", f"{measured['after']['perplexity']:.3f}", "-")
        console.print(shown)
        console.print(
            f"On {about['windows']} × {about['seq_len']} tokens of {about['text']}; zeros that enter the down "
            "projections, mean over layers and tokens.",
            markup=False,
        )
    if result["sparse_out"] is not None:
        console.print(f"[bold]Wrote {escape(result['sparse_out'])}[/], converted with method relu.")
    console.print(f"[bold]Wrote {escape(result['out'])}[/] in {seconds(result['seconds'])}.")
    console.print(f"Checkpoints and event files are in {escape(result['state'])}, and not needed any more.")
