"""`sparsify methods`: the methods of this installation, a line and the paper each."""

from dataclasses import fields
from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from sparsify.cli.output import Format, FormatOption, Output, SaveOption


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("methods", rich_help_panel="Look and check")(methods)


def methods(format: FormatOption = Format.human, save: SaveOption = None) -> None:
    """List the methods that --method takes: what each does, its paper and its options.

    [dim]$[/] sparsify methods
    """
    output = Output(format, save)
    with output.working():
        import sparsify.methods

        found = sparsify.methods.available()
    result: dict[str, Any] = {
        "methods": [
            {
                "name": info.name,
                "summary": info.summary,
                "paper": info.paper,
                "options": [field.name for field in fields(info.config_class)],
            }
            for info in found.values()
        ]
    }
    output.emit(result, lambda console: _render(console, result))


def _render(console: Console, result: dict[str, Any]) -> None:
    for method in result["methods"]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in method["options"])
        console.print(f"[bold]{method['name']}[/]")
        for line in (method["summary"], f"Paper: {method['paper']}", f"Options: {options}"):
            console.print(Padding(Text(line), (0, 0, 0, 2)))
