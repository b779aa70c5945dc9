"""`sparsify plan`: what `sparsify convert` with the same options would do, before anything runs."""

import functools
import inspect
from typing import Any

import typer

from sparsify.cli.convert import convert


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("plan", rich_help_panel="Make and measure")(plan)


@functools.wraps(convert)
def plan(**options: Any) -> None:
    """Say what a conversion would do, from the config and the headers alone.

    Which linears it converts and what stays dense, what the checkpoint will
    hold, memory, disk and time, and whether it fits here. No weight is read and
    nothing is written. The options are those of convert, whose --dry-run says
    the same. The exit code is 1 where it does not fit.

    [dim]$[/] sparsify plan llama-2-7b --method rsparse --sparsity 0.5 --out l2-50
    [dim]$[/] sparsify plan reference --format json
    """
    convert(**options, dry_run=True)


_SIGNATURE = inspect.signature(convert)
_KEPT = [parameter for name, parameter in _SIGNATURE.parameters.items() if name != "dry_run"]
plan.__signature__ = _SIGNATURE.replace(parameters=_KEPT)  # type: ignore[attr-defined]
