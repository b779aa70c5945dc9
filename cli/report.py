"""`sparsify report`: one HTML file about a converted checkpoint, from what other commands stored."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparsify.cli.output import Format, FormatOption, Output, SaveOption


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("report", rich_help_panel="Look and check")(report)


def report(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A converted checkpoint.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of the report.", show_default="CKPT-report")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="JSON that eval, measure, bench or inspect saved, or compare or sweep wrote; once for each file.",
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also put the key numbers into the checkpoint's README.md and manifest.")
    ] = False,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Write one HTML file about a checkpoint, from stored results only.

    Nothing is measured: what is not stored is named with the command that
    stores it. The pictures lie beside the page as PNG and SVG, too.

    [dim]$[/] sparsify report reference-50 --results eval.json --results bench.json
    [dim]$[/] sparsify report reference-50 --results compare.json --out report --card
    """
    output = Output(format, save)
    with output.working():
        from sparsify.evals.report import write_report
        from sparsify.evals.report_card import write_card
        from sparsify.models import resolve_model

        folder = Path(resolve_model(checkpoint))
        target = out if out is not None else Path(f"{folder.resolve().name}-report")
        if out is None and Path(checkpoint).is_dir():
            target = folder.resolve().parent / target
        written = write_report(folder, target, results or [])
        result: dict[str, Any] = {
            "checkpoint": checkpoint,
            "page": str(written.page),
            "pictures": [str(path) for path in written.pictures],
            "missing": [{"what": what, "command": command} for what, command in written.missing],
            "card": str(write_card(folder, results or [])) if card else None,
        }
    output.emit(result, lambda console: _render(console, result))


def _render(console: Console, result: dict[str, Any]) -> None:
    for entry in result["missing"]:
        console.print(f"Not stored: {entry['what']}", markup=False)
        # On a line of its own that is never folded, to be copied.
        console.print(f"  {entry['command']}", markup=False, soft_wrap=True)
    console.print(f"Wrote {result['page']} and {len(result['pictures'])} pictures.", markup=False, soft_wrap=True)
    if result["card"]:
        console.print(f"Wrote the key numbers into {result['card']}.", markup=False, soft_wrap=True)
