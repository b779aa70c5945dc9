"""What a conversion finds in a dense model: its input sites, gathered over equal blocks."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sparsify.cli.output import common_prefix, make_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsify.targets import Targets


def describe_sites(model: "PreTrainedModel", targets: "Targets | None" = None) -> dict[str, Any]:
    """Returns the linears that a conversion would make sparse, kind by kind, and what it would leave dense.

    The model may be on the meta device; targets: its own, where they were found before.
    A kind is a name with its block number replaced by *; linears of one kind and different shapes are two.
    """
    import torch

    from sparsify.targets import find_targets, linear_shape

    targets = targets or find_targets(model, torch.zeros(1, 8, dtype=torch.int64))
    modules = dict(model.named_modules())
    kinds: dict[tuple[str, int, int], dict[str, Any]] = {}
    for site in targets.sites:
        shared = [_kind(name) for name in site.names]
        for name in site.names:
            outputs, inputs = linear_shape(modules[name])
            kind = kinds.setdefault((_kind(name), outputs, inputs), {"count": 0, "shares_input_with": []})
            kind["count"] += 1
            kind["shares_input_with"] = [other for other in dict.fromkeys(shared) if other != _kind(name)]
    rows = [{"linear": n, "outputs": o, "inputs": i, **about} for (n, o, i), about in kinds.items()]
    return {"linears": len(targets.names), "sites": len(targets.sites), "kinds": rows, "left_dense": targets.left_dense}


def sites_table(kinds: Sequence[dict[str, Any]]) -> Table:
    """Returns the table of describe_sites' kinds."""
    prefix = common_prefix([kind["linear"] for kind in kinds])
    title = f"Linears to convert in {prefix.rstrip('.')}" if prefix else "Linears to convert"
    table = make_table(title, "linear", "shares its input with", r"\[out, in]", "count", left=2)
    for kind in kinds:
        others = ", ".join(name.rpartition(".")[2] for name in kind["shares_input_with"]) or "-"
        table.add_row(
            kind["linear"].removeprefix(prefix), others, rf"\[{kind['outputs']}, {kind['inputs']}]", str(kind["count"])
        )
    return table


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)
