"""`sparsify sweep`: the whole frontier of a method on a model, from dense to the sparsest budget asked for."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from sparsify.cli.budgets import cost_table_of
from sparsify.cli.loading import DtypeOption
from sparsify.cli.output import Format, FormatOption, Output, SaveOption, byte_count, make_table, percent
from sparsify.cli.progress import Progress
from sparsify.errors import SparsifyError, UnavailableError

if TYPE_CHECKING:
    from sparsify.evals.sweep import Frontier

FRONTIER, TABLE, PLOT = "frontier.json", "frontier.md", "frontier.png"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("sweep", rich_help_panel="Make and measure")(sweep)


def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense model, as for convert.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of the results; with the same folder a sweep goes on.")
    ],
    method: Annotated[str, typer.Option(help="A method, such as auto, teal@greedy or rsparse:rho=0.95.")] = "auto",
    sparsities: Annotated[str, typer.Option(metavar="LIST", help="0.3..0.8, 0.3..0.8:0.05 or 0.3,0.5.")] = "0.3..0.8",
    max_ppl_increase: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Also mark the sparsest point within this, such as 1%.")
    ] = None,
    cost_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Predict speed-ups; costs are measured where the file is not there."),
    ] = None,
    calibration: Annotated[str, typer.Option(metavar="TEXT", help="Text to calibrate on.")] = "stdlib:calibration",
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Text to measure on.", show_default="the last quarter of the calibration text"
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    limit: Annotated[int, typer.Option(min=1, help="Windows to measure on at most.")] = 32,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw it; needs matplotlib.")] = True,
    dtype: DtypeOption = "auto",
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Measure perplexity over many budgets: the frontier of a method.

    Writes every point to a folder as soon as it is measured, and in the end
    a table and a plot, with the knee and the sparsest point within a limit.

    [dim]$[/] sparsify sweep reference --method auto --sparsities 0.3..0.8 --out sweep
    [dim]$[/] sparsify sweep reference --method teal --max-ppl-increase 1% --out sweep
    [dim]$[/] accelerate launch --num_processes 4 -m sparsify.cli.main sweep llama-3-8b --out sweep
    """
    output = Output(format, save)
    with output.working(), Progress() as progress:
        from sparsify.evals.compare import Settings, Subject, parse_allocation, parse_method
        from sparsify.evals.quality_budget import check_increase
        from sparsify.evals.sweep import parse_sparsities
        from sparsify.evals.sweep import sweep as swept
        from sparsify.hold_out import HELD_OUT, REST
        from sparsify.models import load_dense
        from sparsify.processes import launched

        wanted = parse_sparsities(sparsities)
        parse_method(method, 0.5)
        parse_allocation(method)
        limit_of_rise = None if max_ppl_increase is None else check_increase(max_ppl_increase)
        processes = launched(cpu=True)
        if processes.count > 1 and cost_table is not None and not cost_table.exists():
            raise SparsifyError(
                f"--cost-table {cost_table} does not exist, and several processes would disturb each other's timings: "
                "measure it with one process first"
            )
        _check_out(out, plot=plot)
        own = calibration + REST if text is None else calibration
        subject = Subject(model, own, calibration + HELD_OUT if text is None else text)
        settings = Settings(seq_len=seq_len, limit=limit, sequences=sequences, dtype=dtype)
        dense = load_dense(model, dtype=dtype)
        costs = None
        if cost_table is not None:
            windows = _calibration(own, model, sequences, seq_len)
            costs = cost_table_of(cost_table, lambda: load_dense(model, dtype=dtype), windows, progress)
        progress.note(f"measuring {len(wanted)} points; those in {out} are not measured again")
        frontier = swept(
            subject, method, wanted, out=out, settings=settings, model=dense, costs=costs,
            max_increase=limit_of_rise, processes=processes,
        )  # fmt: skip
        if processes.first:
            _write(out, frontier, plot=plot)
    result = {"out": str(out)} | frontier.to_dict()
    output.emit(result, lambda console: _render(console, frontier, out))


def _check_out(out: Path, *, plot: bool) -> None:
    """Makes the folder; raises before the work where it cannot be, or where matplotlib is missing."""
    if plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UnavailableError(
                "the plot needs matplotlib: pip install 'sparsify-llm[report]', or --no-plot"
            ) from None
    if out.exists() and not out.is_dir():
        raise SparsifyError(f"--out {out} is a file: name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UnavailableError(f"--out {out} cannot be made: {problem.strerror}") from None


def _calibration(spec: str, model: str, sequences: int, seq_len: int) -> Any:
    from sparsify.calibration import Calibration
    from sparsify.models import load_tokenizer
    from sparsify.text import read_text

    return Calibration.from_text(read_text(spec), load_tokenizer(model), sequences=sequences, seq_len=seq_len)


def _write(out: Path, frontier: "Frontier", *, plot: bool) -> None:
    from sparsify.evals.sweep import table
    from sparsify.evals.sweep_plot import save_plot

    (out / FRONTIER).write_text(json.dumps(frontier.to_dict(), indent=1) + "\n", encoding="utf-8")
    (out / TABLE).write_text(table(frontier), encoding="utf-8")
    if plot:
        save_plot(frontier, out / PLOT)


def _render(console: Console, frontier: "Frontier", out: Path) -> None:
    from sparsify.evals.sweep import marks

    speeds = any(point.predicted_speedup is not None for point in frontier.points)
    columns = ["sparsity", "realised", "bytes", "perplexity", "increase", *(["speed-up"] if speeds else []), ""]
    shown = make_table(f"{escape(frontier.model)}, {escape(frontier.method)}", *columns, left=0)
    for point in frontier.points:
        speed = ["-" if point.predicted_speedup is None else f"{point.predicted_speedup:.2f}"] if speeds else []
        shown.add_row(
            percent(point.sparsity), percent(point.realised_sparsity), byte_count(point.bytes),
            f"{point.perplexity:.3f}", f"{point.increase:+.2%}", *speed, ", ".join(marks(frontier, point)),
        )  # fmt: skip
    console.print(shown)
    for sparsity, why in frontier.refused.items():
        console.print(f"{float(sparsity):.1%} was refused: {why}", markup=False)
    if frontier.max_increase is not None and frontier.sparsest_within is None:
        console.print(f"No point is within {frontier.max_increase:.3%}.")
    if speeds:
        console.print("Speed-ups are predicted from measured costs, over the best dense way.")
    console.print(
        f"Perplexity on {frontier.tokens:,} tokens of {frontier.text}, every token sparse; calibrated on "
        f"{frontier.calibration}.",
        markup=False,
    )
    console.print(f"[bold]Wrote {escape(str(out))}[/].")
