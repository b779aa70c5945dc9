"""A picture of `sweep`: perplexity by the bytes of weights that a token touches, with the marked points."""

from pathlib import Path

from sparsify.evals.sweep import Frontier, marks

_COLOURS = {"line": "#1b7f79", "mark": "#c0392b", "limit": "#9a9fa6"}


def save_plot(frontier: Frontier, path: Path) -> None:
    """Draws the frontier, dense included."""
    # Not pyplot: it keeps state and looks for a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    megabytes = [point.bytes / 1e6 for point in frontier.points]
    perplexities = [point.perplexity for point in frontier.points]
    axes.plot(megabytes, perplexities, marker="o", color=_COLOURS["line"])
    for point, x, y in zip(frontier.points, megabytes, perplexities, strict=True):
        marked = marks(frontier, point)
        name = "dense" if point.sparsity == 0.0 else f"{point.sparsity:.0%}"
        axes.annotate(", ".join([name, *marked]), (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
        if marked:
            axes.plot([x], [y], marker="o", markersize=11, fillstyle="none", color=_COLOURS["mark"])
    if frontier.max_increase is not None:
        limit = frontier.points[0].perplexity * (1.0 + frontier.max_increase)
        axes.axhline(limit, linestyle="--", linewidth=1, color=_COLOURS["limit"])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("MB of weights that a token touches, realised")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{frontier.model}, {frontier.method}, {frontier.text}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
