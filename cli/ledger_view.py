"""The byte ledger for a reader: what one token touches, dense against sparse."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sparsify.cli.output import byte_count, make_table, percent

if TYPE_CHECKING:
    from sparsify.ledger import Ledger


def ledger_totals(ledger: "Ledger") -> dict[str, Any]:
    """Returns the ledger without its single linears: bytes per token and sparsities."""
    totals = {name: value for name, value in ledger.to_dict().items() if name != "linears"}
    return totals | {"linears": len(ledger.linears)}


def totals_table(totals: Mapping[str, Any], title: str = "Weights that one token touches") -> Table:
    """Returns the table of ledger_totals."""
    table = make_table(title, "", "dense", "sparse", "saved")
    dense, touched = totals["dense_bytes_per_token"], totals["touched_bytes_per_token"]
    rest = totals["rest_bytes_per_token"]
    linears = f"{totals['linears']} converted linears"
    table.add_row(linears, byte_count(dense), byte_count(touched), percent(totals["weighted_sparsity"]))
    table.add_row("everything else", byte_count(rest), byte_count(rest), percent(0.0))
    whole = (byte_count(dense + rest), byte_count(touched + rest), percent(totals["model_sparsity"]))
    table.add_row("all", *whole, style="bold")
    return table


def print_left_dense(console: Console, statements: Sequence[str]) -> None:
    """Says what stayed dense inside the blocks, a line each."""
    for statement in statements:
        console.print(f"Left dense: {statement}", markup=False)
