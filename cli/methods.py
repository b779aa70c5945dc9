"""`sparsify methods`: the methods of this installation, with the paper and the facts of each."""

from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from sparsify.cli.output import Format, FormatOption, Output, SaveOption
from sparsify.cli.ppl_p_conversion import PPL_P
from sparsify.cli.relufy_conversion import RELUFY

# What --method takes beside the methods of sparsify.methods: ways to get to one of them.
_WAYS = (
    {
        "name": f"{RELUFY}, {RELUFY}+METHOD",
        "summary": "A kind of ReLU in the place of the model's activation, MLPs fitted with --reconstruct; then relu",
        "paper": "ReLU Strikes Back, Mirzadeh et al. 2023, arXiv 2310.04564",
        "options": ["activation", "after-norms", "reconstruct", "plain", "cut", "cett", "zeros"],
    },
    {
        "name": PPL_P,
        "summary": "MLP neurons below a threshold of each layer, as many as a rise of perplexity allows",
        "paper": "Sparsing Law, Luo et al. 2024, arXiv 2411.02335",
        "options": ["max-ppl-increase"],
    },
)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("methods", rich_help_panel="Look and check")(methods)


def methods(format: FormatOption = Format.human, save: SaveOption = None) -> None:
    """List the methods that --method takes: what each does, its paper, facts and options.

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
                **asdict(info.facts),
                "options": list(info.options),
            }
            for info in found.values()
        ],
        "ways": list(_WAYS),
    }
    output.emit(result, lambda console: _render(console, result))


def _render(console: Console, result: dict[str, Any]) -> None:
    for method in result["methods"]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in method["options"])
        console.print(f"[bold]{method['name']}[/]")
        lines = (
            method["summary"],
            f"Paper: {method['paper']}",
            f"Sparsifies: {method['sparsifies']}; {method['choice']}, by {method['rule']}",
            f"Same choice under tensor parallelism: {'yes' if method['tensor_parallel'] else 'no'}",
            f"Kernels: {', '.join(method['kernels'])}",
            f"Options: {options}",
        )
        _print(console, *lines)
    console.print("Ways to a method, which --method takes, too:")
    for way in result["ways"]:
        console.print(f"[bold]{way['name']}[/]")
        options = ", ".join(f"--{name}" for name in way["options"])
        _print(console, way["summary"], f"Paper: {way['paper']}", f"Options: {options}")


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(Padding(Text(line), (0, 0, 0, 2)))
