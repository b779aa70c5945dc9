"""`sparsify compare`: methods × budgets × protocols × calibration seeds on a model, as a table, a plot and JSON."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from sparsify.cli.loading import DeviceOption, TrustOption, pick_device
from sparsify.cli.output import Format, FormatOption, Output, make_table
from sparsify.cli.progress import Progress
from sparsify.errors import SparsifyError
from sparsify.launch import launched_index

if TYPE_CHECKING:
    from sparsify.evals.cells import Cell
    from sparsify.evals.comparison_summary import Section
    from sparsify.evals.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("compare", rich_help_panel="Make and measure")(compare)


def compare(
    out: Annotated[
        Path, typer.Option(help="The results, FILE.json; cells in it are kept. The table is FILE.md.", metavar="FILE")
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder, a hub id, an alias such as llama-3-8b, or reference. Without it, and without --recipe, "
            "nothing is measured: table and plot are made of what the file holds.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help=r"NAME\[:OPTION=VALUE,...]\[@ALLOCATION], separated by commas, or the flag again; see "
            "`sparsify methods`.",
            metavar="LABELS",
            show_default="teal,wina,rsparse,auto",
        ),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(help="Budgets, separated by commas.", metavar="SHARES", show_default="0.25,0.4,0.5,0.6,0.7"),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="every-token, decode or both; see `sparsify eval`.", show_default="every-token"),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="How many draws of calibration windows to repeat it with.", show_default="1")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on, as in `sparsify convert`.", metavar="TEXT", show_default="stdlib:calibration"
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text to evaluate on, as in `sparsify eval`.", metavar="TEXT", show_default="as in eval"),
    ] = None,
    sequences: Annotated[int | None, typer.Option(help="Calibration windows.", show_default="32")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window of both texts.", show_default="512")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", show_default="no overlap")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Evaluation windows at most.", show_default="all of the text")
    ] = None,
    generation: Annotated[
        int | None, typer.Option(help="Prompts of the generation check; slow.", show_default="0: none")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens of its continuations.", show_default="128")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows at once.", show_default="8")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Settings of a published number; flags win over it.", metavar="NAME")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16.", show_default="auto"),
    ] = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    plot: Annotated[
        bool, typer.Option("--plot/--no-plot", help="Draw FILE.png and FILE.svg; takes matplotlib.")
    ] = True,
    format: FormatOption = Format.human,
) -> None:
    """Compare methods on one model, text and protocol.

    Every cell is written when it is measured: the same command again goes on
    where it was stopped, and other models can go into the same file.

    [dim]$[/] sparsify compare reference --methods teal,wina,auto --sparsity 0.4,0.5 --out compare.json
    [dim]$[/] sparsify compare --recipe llama-2-7b-wikitext2 --seeds 3 --out llama-2-7b.json
    """
    given = {
        "model": model, "methods": _labels(methods), "sparsities": _shares(sparsity),
        "protocols": None if protocol is None else [name.strip() for part in protocol for name in part.split(",")],
        "seeds": seeds, "calibration": calibration, "text": text, "sequences": sequences, "seq_len": seq_len,
        "stride": stride, "limit": limit, "generation": generation, "new_tokens": new_tokens,
        "batch_size": batch_size, "dtype": dtype,
    }  # fmt: skip
    output = Output(format)
    with output.working(), Progress() as progress:
        from sparsify.evals.comparison_plot import check_plot
        from sparsify.evals.comparison_summary import sections
        from sparsify.evals.recipe import Recipe, read_recipe

        _check_out(out)
        if plot:
            check_plot()
        base = Recipe() if recipe is None else read_recipe(recipe)
        plan = base.updated({name: value for name, value in given.items() if value is not None}, source="flags")
        cells = _cells(plan, out, device, trust_remote_code, progress)
        found = sections(cells)
        written = _write(out, cells, plot=plot) if launched_index() == 0 else []
    result = {"out": str(out), "written": written, "sections": [_summary(section) for section in found]}
    output.emit(result, lambda console: _render(console, result))


def _labels(given: list[str] | None) -> list[str] | None:
    from sparsify.evals.compare_labels import split_labels

    return None if given is None else [label for text in given for label in split_labels(text)]


def _shares(given: list[str] | None) -> list[float] | None:
    if given is None:
        return None
    try:
        return [float(part) for text in given for part in text.split(",")]
    except ValueError:
        raise SparsifyError(
            f"--sparsity {','.join(given)}: give numbers in [0, 1), separated by commas, such as 0.4,0.5"
        ) from None


def _check_out(out: Path) -> None:
    """Checks, before hours of work, that the three kinds of files can be told apart."""
    if out.suffix != ".json":
        raise SparsifyError(f"--out {out}: the name must end in .json; the table and the plot are written beside it")
    if out.is_dir():
        raise SparsifyError(f"--out {out} is a folder; give the path of a file")


def _cells(plan: "Recipe", out: Path, device: str | None, trust: bool, progress: Progress) -> "list[Cell]":
    """Returns all cells of the file, after measuring those that the plan asks for and it lacks."""
    from sparsify.evals.cells import read_cells
    from sparsify.evals.compare import run
    from sparsify.evals.compare_subject import Subject
    from sparsify.models import resolve_model
    from sparsify.processes import launched
    from sparsify.text import default_evaluation_text

    if plan.model is None:
        if not out.exists():
            raise SparsifyError(
                f"no MODEL and no --recipe, and {out} does not exist: name a model to measure, or a file of results"
            )
        return read_cells(out)
    resolve_model(plan.model)
    text = plan.text
    if text is None:
        default, why = default_evaluation_text(plan.model)
        progress.note(why)
        text = default.name
    progress.note(f"loading {plan.model}")
    place = pick_device(device)
    return run(
        [Subject(plan.model, plan.calibration, text)],
        out=out, methods=plan.methods, sparsities=plan.sparsities, protocols=plan.protocols, seeds=plan.seeds,
        settings=plan.settings(device=place, trust_remote_code=trust), note=progress.note,
        processes=launched(cpu=place.startswith("cpu")),
    )  # fmt: skip


def _write(out: Path, cells: "list[Cell]", *, plot: bool) -> list[str]:
    """Writes table and plot beside the results; returns their paths."""
    from sparsify.evals.comparison_plot import save_plot
    from sparsify.evals.comparison_summary import sections
    from sparsify.evals.comparison_table import render

    table, pictures = out.with_suffix(".md"), [out.with_suffix(suffix) for suffix in (".png", ".svg")]
    table.write_text(render(cells), encoding="utf-8")
    drawn = plot and save_plot(sections(cells), pictures)
    return [str(path) for path in (table, *(pictures if drawn else ()))]


def _summary(section: "Section") -> dict[str, Any]:
    """Returns a section's means and deviations as JSON values."""
    from sparsify.evals import comparison_summary as of

    def spread(entry: of.Entry, value: Callable[["Cell"], float | None]) -> dict[str, Any] | None:
        found = entry.spread(value)
        return None if found is None else {"mean": found.mean, "std": found.std, "seeds": found.seeds}

    values: dict[str, Callable[[Cell], float | None]] = {
        "perplexity": of.perplexity,
        "kl": of.kl,
        "top1_agreement": of.top1_agreement,
        "realised_sparsity": of.realised_sparsity,
        "agreement": of.generated("agreement"),
    }
    entries = [
        {"method": entry.method, "sparsity": entry.sparsity, "refused": entry.refused}
        | {name: spread(entry, value) for name, value in values.items()}
        | {"ratio_to_teal": section.ratio_to_teal(entry.method, entry.sparsity)}
        for entry in section.entries.values()
    ]
    dense = None if section.dense is None else of.perplexity(section.dense)
    return {"key": section.key, "dense_perplexity": dense, "entries": entries}


def _render(console: Console, result: dict[str, Any]) -> None:
    for section in result["sections"]:
        entries = {(entry["method"], entry["sparsity"]): entry for entry in section["entries"]}
        budgets = sorted({budget for _, budget in entries})
        dense = section["dense_perplexity"]
        title = f"{section['key']['model']}, {section['key']['protocol']}: perplexity, dense "
        title += "not measured" if dense is None else _number(dense)
        table = make_table(escape(title), "", *(f"{budget:.0%}" for budget in budgets))
        for method in dict.fromkeys(method for method, _ in entries):
            table.add_row(escape(method), *(_brief(entries.get((method, budget))) for budget in budgets))
        console.print(table)
    for path in (result["out"], *result["written"]):
        console.print(f"Wrote {path}", markup=False, soft_wrap=True)


def _brief(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return "refused" if entry["perplexity"] is None else _number(entry["perplexity"]["mean"])


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1e4 or math.isinf(value) else f"{value:.2e}"
