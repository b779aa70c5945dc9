"""The one budget of a conversion: a share of bytes, a rise of perplexity, or a speed; asked for, met, and told."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparsify.cli.output import make_table, percent
from sparsify.cli.progress import Progress
from sparsify.cli.settings import ConvertSettings
from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsify.allocation import Allocation
    from sparsify.calibration import Calibration
    from sparsify.evals.cost_table import CostTable
    from sparsify.methods import AnyMethod
    from sparsify.text import Windows

# The settings of which one may be given, and what is asked for where none is.
BUDGETS = ("sparsity", "max_ppl_increase", "speedup")
DEFAULT_SPARSITY = 0.5
DEFAULT_HELD_OUT = 32
# Seconds of waiting in a second from which a measurement is called disturbed.
_BUSY = 0.05


@dataclass(frozen=True)
class Met:
    """A budget that was met: a line for the model card and the document for --format json, None for a sparsity."""

    said: str | None = None
    found: dict[str, Any] | None = None


def settle_budget(settings: ConvertSettings) -> ConvertSettings:
    """Returns the settings with exactly one budget, none for relu, checked, and the options that it leaves open.

    Raises SparsifyError for two budgets, one out of range, and options of another one.
    """
    from sparsify.evals.quality_budget import check_increase
    from sparsify.evals.speed_budget import check_speedup

    given = {name: getattr(settings, name) for name in BUDGETS if getattr(settings, name) is not None}
    if len(given) > 1:
        said = " and ".join(f"{_flag(name)} {value}" for name, value in given.items())
        raise SparsifyError(f"{said} are {len(given)} budgets: give exactly one of {', '.join(map(_flag, BUDGETS))}")
    for option, budget in (("held_out", "max_ppl_increase"), ("cost_table", "speedup")):
        if getattr(settings, option) is not None and budget not in given:
            raise SparsifyError(f"{_flag(option)} is for {_flag(budget)}: leave it out")
    if not given:
        # relu by itself keeps what the ReLUs leave: there is nothing to ask for.
        return settings if settings.method == "relu" else replace(settings, sparsity=DEFAULT_SPARSITY)
    if settings.recipe is not None and "sparsity" not in given:
        raise SparsifyError(f"--recipe says each linear's sparsity, and so would {_flag(next(iter(given)))}: give one")
    if settings.speedup is not None:
        check_speedup(settings.speedup)
    if settings.max_ppl_increase is None:
        return settings
    if settings.allocation_state is not None:
        raise SparsifyError("--allocation-state is the search of one sparsity, and --max-ppl-increase tries many")
    held_out = DEFAULT_HELD_OUT if settings.held_out is None else settings.held_out
    check_increase(settings.max_ppl_increase)
    return replace(settings, held_out=held_out)


def meet_budget(
    settings: ConvertSettings,
    make: "Callable[[], PreTrainedModel]",
    method: "AnyMethod",
    allocation: "Allocation",
    calibration: "Calibration",
    held_out: "Windows | None",
    progress: Progress,
) -> "tuple[PreTrainedModel, Met]":
    """Converts what make returns so that it meets the settings' budget; returns it and what was found."""
    from sparsify.conversion import convert
    from sparsify.evals.quality_budget import check_increase, convert_within

    if settings.speedup is not None:
        return _meet_speed(settings, make, method, allocation, calibration, progress)
    if settings.max_ppl_increase is None or held_out is None:
        model = convert(make(), method, calibration, allocation=allocation, rotate=settings.rotate, progress=progress)
        return model, Met()
    model, found = convert_within(
        make, method, calibration, held_out, max_increase=check_increase(settings.max_ppl_increase),
        allocation=allocation, rotate=settings.rotate, progress=progress, note=progress.note,
    )  # fmt: skip
    said = (
        f"perplexity at most {found.max_increase:.3%} above dense: found {percent(found.sparsity)}, where it is "
        f"{found.increase:.3%} above, on {found.tokens:,} tokens of {found.text}, of {len(found.tries)} tries"
    )
    return model, Met(said, {"kind": "max_ppl_increase"} | found.to_dict())


def print_budget(console: Console, found: dict[str, Any] | None) -> None:
    """Prints what a search for a budget tried, or what was predicted and measured; nothing for a sparsity."""
    if found is None:
        return
    if found["kind"] == "ppl-p":
        console.print(f"Budget: {found['said']}.", markup=False)
        return
    if found["kind"] == "speedup":
        _print_speed(console, found)
        return
    title = f"Perplexity on held-out text, dense {found['dense_perplexity']:.4f}"
    table = make_table(title, "try", "sparsity", "sparse", "increase", f"within {found['max_increase']:.3%}", left=0)
    for number, entry in enumerate(found["tries"], start=1):
        refused = entry["increase"] is None
        measured = ("refused", "-") if refused else (f"{entry['perplexity']:.4f}", f"{entry['increase']:+.3%}")
        table.add_row(str(number), percent(entry["sparsity"], 2), *measured, "yes" if entry["within"] else "no")
    console.print(table)
    console.print(
        f"{percent(found['sparsity'], 2)} is the sparsest within {found['max_increase']:.3%}, to "
        f"{percent(found['tolerance'])} of sparsity, on {found['tokens']:,} tokens of {found['text']}.",
        markup=False,
    )


def _meet_speed(
    settings: ConvertSettings,
    make: "Callable[[], PreTrainedModel]",
    method: "AnyMethod",
    allocation: "Allocation",
    calibration: "Calibration",
    progress: Progress,
) -> "tuple[PreTrainedModel, Met]":
    from sparsify.conversion import convert
    from sparsify.evals.sides import dense_copy
    from sparsify.evals.speed_budget import measured_budget, sparsity_for
    from sparsify.methods import get_method

    assert settings.speedup is not None
    kernels = get_method(method.name).facts.kernels
    if kernels == ("reference",):
        raise SparsifyError(f"--speedup: method {method.name} has no kernel that skips weights, so nothing gets faster")
    path = None if settings.cost_table is None else Path(settings.cost_table)
    table = cost_table_of(path, make, calibration, progress)
    sparsity = sparsity_for(table, settings.speedup)
    progress.note(f"sparsity {sparsity:.1%} is predicted to be {table.predicted_speedup(sparsity):.2f} times as fast")
    method = replace(method, sparsity=sparsity)
    model = convert(make(), method, calibration, allocation=allocation, rotate=settings.rotate, progress=progress)
    rows, _ = dense_copy(model, make)
    found = measured_budget(
        model, rows, calibration, table, speedup=settings.speedup, progress=progress.stage("measure speed")
    )
    document = {"kind": "speedup"} | found.to_dict() | {"cost_table": table.to_dict()}
    said = (
        f"{found.speedup:g} times as fast as the best dense way: found {percent(found.sparsity)}, predicted "
        f"{found.predicted:.2f}, measured {found.measured.median:.2f} ({found.measured.p10:.2f} to "
        f"{found.measured.p90:.2f} by round) on {table.machine['cpu']}, {table.machine['threads']} threads"
    )
    return model, Met(said, document)


def cost_table_of(
    path: Path | None, make: "Callable[[], PreTrainedModel]", calibration: "Calibration", progress: Progress
) -> "CostTable":
    """Returns the costs in a file, or measures them and, where a file is named, writes it."""
    from sparsify.evals.cost_table import measure_costs, read_cost_table
    from sparsify.evals.sides import dense_copy

    model = make()
    if path is not None and path.exists():
        return read_cost_table(path, model)
    if path is not None and not path.absolute().parent.is_dir():
        raise SparsifyError(f"--cost-table {path} is in a folder that does not exist")
    rows, _ = dense_copy(model, make)
    table = measure_costs(model, rows, calibration, progress=progress.stage("measure costs"))
    if path is not None:
        table.save(path)
    return table


def _print_speed(console: Console, found: dict[str, Any]) -> None:
    table = make_table("Times as fast as the best dense way", "", "speed-up", "dense side", left=1)
    measured = found["measured"]
    table.add_row("asked for", f"{found['speedup']:.2f}", "")
    table.add_row("predicted", f"{found['predicted']:.2f}", found["predicted_best_dense"])
    spread = f"{measured['median']:.2f} ({measured['p10']:.2f} to {measured['p90']:.2f})"
    table.add_row("measured", spread, found["measured_best_dense"])
    console.print(table)
    costs = found["cost_table"]
    if measured["median"] < found["speedup"]:
        console.print("What was measured is less than what was asked for.")
    if max(costs["waited_for_cpu"] or 0.0, found["waited_for_cpu"] or 0.0) >= _BUSY:
        console.print("The machine was busy while this was measured: measure again when it is quiet.")
    if found["fits_in_cache"]:
        console.print(
            "The weights that a token touches fit in the last-level cache: a larger model behaves differently."
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
