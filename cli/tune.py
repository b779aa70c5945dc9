"""`sparsify tune`: the fastest tiles of the GPU kernels for a model's shapes on this GPU, as a table."""

from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparsify.cli.output import Format, FormatOption, Output, make_table
from sparsify.cli.progress import Progress
from sparsify.errors import SparsifyError, suggest

_TOKENS = (1, 2, 4, 8)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("tune", rich_help_panel="Make and measure")(tune)


def tune(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the table; one that is there is continued.")
    ],
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The shapes of a model, such as llama-3-8b; any number.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="KxN1+N2", help="Linears with K inputs that share them, such as 4096x14336+14336."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[
        list[int] | None, typer.Option(help="At once: 1, 2, 4 or 8; any number of them.", show_default="all")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time for all launches together.")] = 90.0,
    device: Annotated[str, typer.Option(help="The GPU.")] = "cuda",
    format: FormatOption = Format.human,
) -> None:
    """Find the fastest tiles for this GPU's kernels.

    Takes a GPU that does nothing else. What was found is used where
    SPARSIFY_TILES names the folder. The table is written after every launch:
    the same command again goes on where the time ended.

    [dim]$[/] sparsify tune --model llama-3-8b --seconds 600 --out tiles
    [dim]$[/] SPARSIFY_TILES=tiles sparsify bench CKPT
    """
    output = Output(format)
    with output.working(), Progress() as progress:
        result = _tuned(model or [], shape or [], dtype, tokens or list(_TOKENS), seconds, device, out, progress)
    output.emit(result, lambda console: _render(console, result))


def _tuned(
    models: list[str],
    shapes: list[str],
    dtype: str,
    tokens: list[int],
    seconds: float,
    device: str,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    from sparsify.evals.gpu_timing import DTYPES
    from sparsify.evals.tile_search import launches_of
    from sparsify.evals.tuning import sites_of, tune_device

    if dtype not in DTYPES:
        raise SparsifyError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}.{suggest(dtype, DTYPES)}")
    launches = launches_of(sites_of(models, shapes), DTYPES[dtype], tokens)
    tuning = tune_device(launches, out, seconds=seconds, device=device, progress=progress.stage("tune"))
    keys = [launch.key for launch in launches]
    found = {key: tuning.launches[key] for key in keys if key in tuning.launches}
    tiles = {key: list(astuple(tuning.tiles[key])) if key in tuning.tiles else None for key in found}
    return {
        "file": tuning.path,
        "device": tuning.about["device"],
        "asked": keys,
        "finished": [key for key in found if found[key]["complete"]],
        "crossover": tuning.crossover,
        "launches": {key: {"tile": tiles[key], **found[key]} for key in found},
    }


def _render(console: Console, result: dict[str, Any]) -> None:
    table = make_table(f"Tiles, {result['device']}", "launch", "tile", "rule, µs", "µs", "gain", "tried", left=1)
    for key, launch in result["launches"].items():
        best, rule, gain = launch["seconds"], launch["rule_seconds"], launch["gain"]
        table.add_row(
            key if launch["complete"] else f"{key} (unfinished)",
            "none works" if launch["tile"] is None else " ".join(map(str, launch["tile"])),
            "-" if rule is None else f"{1e6 * rule:.1f}",
            "-" if best is None else f"{1e6 * best:.1f}",
            "-" if gain is None else f"{gain:.2f}×",
            _counts(launch),
        )
    console.print(table)
    console.print(
        "A tile is: columns, channels, splits, warps, stages of a program; the rule is what runs without a table."
    )
    if result["crossover"] is not None:
        console.print(
            f"Lists of channels are faster than masks below a density of {result['crossover']['indexed_below']}."
        )
    left = len(result["asked"]) - len(result["finished"])
    if left:
        console.print(f"{left} of {len(result['asked'])} launches are not finished: the same command again goes on.")
    console.print(f"Table: {result['file']}", soft_wrap=True)


def _counts(launch: dict[str, Any]) -> str:
    bad = [f"{launch[name]} {name}" for name in ("failed", "wrong") if launch[name]]
    return ", ".join([str(launch["tried"]), *bad])
