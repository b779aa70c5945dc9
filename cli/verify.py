"""`sparsify verify`: whether a converted checkpoint is whole and as it was written."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparsify.cli.output import Format, FormatOption, Output, SaveOption


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("verify", rich_help_panel="Look and check")(verify)


def verify(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="A converted checkpoint.", show_default=False)],
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Check a checkpoint against its manifest and its configuration.

    Every file's size and SHA-256, every tensor's name, shape and dtype, that
    what sparsify added is finite, and the ledger. Names each problem, down to
    the tensor and the key of config.json; exits with 1 where there is one, with
    3 where DIR is no converted checkpoint at all. Whoever can write DIR can
    write its manifest: compare the printed SHA-256 with the one you were told.

    [dim]$[/] sparsify verify reference-50
    """
    output = Output(format, save)
    with output.working():
        import sparsify.checkpoint
        from sparsify.manifest import checkpoint_sha256

        problems = sparsify.checkpoint.verify(checkpoint)
        identity = checkpoint_sha256(Path(checkpoint))
    result: dict[str, Any] = {"checkpoint": checkpoint, "sound": not problems, "problems": problems}
    result["checkpoint_sha256"] = identity
    output.emit(result, lambda console: _render(console, result))
    if problems:
        raise typer.Exit(1)


def _render(console: Console, result: dict[str, Any]) -> None:
    if result["sound"]:
        console.print(f"{result['checkpoint']}: every file and tensor is as it was written", markup=False)
        console.print(f"SHA-256 of its files: {result['checkpoint_sha256']}", markup=False, soft_wrap=True)
        return
    for problem in result["problems"]:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    many = len(result["problems"])
    console.print(f"{result['checkpoint']}: {many} problem{'s' if many > 1 else ''}", markup=False)
