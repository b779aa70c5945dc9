"""`sparsify tune`: the fastest tiles of the GPU kernels for a model's shapes on this GPU, as a table."""

import re
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparsify.cli.output import Format, FormatOption, Output, make_table
from sparsify.cli.progress import Progress
from sparsify.errors import SparsifyError, suggest

if TYPE_CHECKING:
    import torch

    from sparsify.evals.gpu_timing import Site

_TOKENS = (1, 2, 4, 8)
# KxN1+N2: linears [N1, K] and [N2, K] that share their input.
_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*(?:\+[1-9]\d*){0,2})")


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


def parse_shape(text: str) -> tuple[int, tuple[int, ...]]:
    """Returns (K, outputs) of "KxN1+N2+N3", one to three outputs. Raises SparsifyError for anything else."""
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise SparsifyError(f"--shape {text} is none: write KxN, KxN1+N2 or KxN1+N2+N3, such as 4096x14336+14336")
    return int(found[1]), tuple(int(part) for part in found[2].split("+"))


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
    import torch

    from sparsify.evals.gpu_timing import DTYPES, GraphTimer
    from sparsify.evals.machine import cache_of
    from sparsify.evals.tuning import Limits, SiteMeasure, Tuning, about, launches_of, tune
    from sparsify.kernels.gpu.tiles import file_name

    if dtype not in DTYPES:
        raise SparsifyError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}.{suggest(dtype, DTYPES)}")
    launches = launches_of(_sites(models, shapes), DTYPES[dtype], tokens)
    timer = GraphTimer(_device(device))
    torch.cuda.set_device(timer.device)
    facts = about(timer.device)
    out.mkdir(parents=True, exist_ok=True)
    tuning = Tuning(out / file_name(facts["device"]), facts)
    measure = SiteMeasure(timer.device, timer, cache=cache_of(timer.device) or 0)
    tune(
        launches,
        tuning,
        measure,
        Limits.of(timer.device),
        seconds=seconds,
        compare=lambda sites, table: measure.compare(sites, table, DTYPES[dtype]),
        progress=progress.stage("tune"),
    )
    keys = [launch.key for launch in launches]
    return {
        "file": tuning.path,
        "device": facts["device"],
        "asked": keys,
        "finished": [key for key in keys if tuning.launches.get(key, {}).get("complete")],
        "crossover": tuning.crossover,
        "launches": {
            key: {"tile": list(astuple(tuning.tiles[key])) if key in tuning.tiles else None, **tuning.launches[key]}
            for key in keys
            if key in tuning.launches
        },
    }


def _device(name: str) -> "torch.device":
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SparsifyError(f"--device {name} is none; write cuda or cuda:1") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _sites(models: list[str], shapes: list[str]) -> "list[Site]":
    from sparsify.evals.gpu_kernel_speed import MODELS
    from sparsify.evals.gpu_timing import Site

    if not models and not shapes:
        raise SparsifyError(f"give --model NAME ({', '.join(MODELS)}) or --shape KxN, or several of them")
    for name in models:
        if name not in MODELS:
            known = ", ".join(MODELS)
            raise SparsifyError(
                f"unknown model {name!r}: known are {known}, for others give --shape.{suggest(name, MODELS)}"
            )
    sites = [site for name in models for site in MODELS[name].sites()]
    return sites + [Site(text, *parse_shape(text)) for text in shapes]


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
