"""A picture of `sparsify compare`: perplexity against the bytes that the methods really touch, a panel a section.

Where a method explodes, its point is left out of the range and marked at the upper edge: it would flatten the rest.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import UnavailableError
from sparsify.evals.comparison_summary import Section, Spread, perplexity, realised_sparsity

# The range ends at this multiple of the worst of the best: of each budget's best method, the largest perplexity.
_HEADROOM = 1.5
# From this ratio of the range's ends on, the axis is logarithmic.
_LOG_FROM = 3.0
# Room at both ends of the range, as a share of it.
_ROOM = 0.04
_MARKERS = "osDvPX*<>p"
_COLUMNS = 2


def check_plot() -> None:
    """Raises UnavailableError without matplotlib; before hours of work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnavailableError(
            "the plot needs matplotlib: pip install 'sparsify-llm[report]', or leave it out with --no-plot"
        ) from None


def save_plot(sections: Sequence[Section], paths: Sequence[Path]) -> bool:
    """Draws the sections that hold results into the files, PNG or SVG by their names; False where none holds any."""
    # Not pyplot: it keeps state and looks for a display.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = [section for section in sections if any(entry.cells for entry in section.entries.values())]
    if not shown:
        return False
    methods = list(dict.fromkeys(method for section in shown for method in section.methods))
    columns = min(len(shown), _COLUMNS)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(6.0 * columns + 2.2, 4.2 * rows), layout=ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.1))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for panel, section in zip(panels, shown, strict=False):
        handles |= _panel(panel, section, {method: _style(index) for index, method in enumerate(methods)})
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    order = [name for name in ("dense", *methods) if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside right upper", fontsize=9, frameon=False)
    # No date and no random names: the same results are the same file.
    with rc_context({"svg.hashsalt": "sparsify"}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def _panel(axes: Any, section: Section, styles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Draws one section; returns what stands for each name in the legend."""
    curves = {method: _curve(section, method) for method in section.methods}
    curves = {method: points for method, points in curves.items() if points}
    means = [y.mean for points in curves.values() for _, y in points]
    dense = [perplexity(section.dense)] if section.dense is not None else []
    end = _set_axis(axes, min(means + dense), min(max(means), _end(section)))
    handles: dict[str, Any] = {}
    for method, points in curves.items():
        xs, ys = [x for x, _ in points], [y.mean for _, y in points]
        errors = [y.std or 0.0 for _, y in points]
        handles[method] = axes.errorbar(
            xs, ys, yerr=errors, markersize=4.5, linewidth=1.4, capsize=2.5, **styles[method]
        )  # fmt: skip
        outside = [x for x, y in zip(xs, ys, strict=True) if y > end]
        (marks,) = axes.plot(
            outside, [1.0] * len(outside), "^", color=styles[method]["color"], markersize=8, clip_on=False,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        marks.set_in_layout(False)
    for value in dense:
        handles["dense"] = axes.axhline(value, color="#444444", linestyle="--", linewidth=1.1)
    axes.set_ylabel("perplexity" + (", log scale" if axes.get_yscale() == "log" else ""))
    key = section.key
    axes.set_title(f"{key['model']}, {key['protocol']}, {key['text']}", fontsize=10, loc="left", pad=10)
    note = "± 1 standard deviation over calibration seeds" if section.seeds > 1 else "one calibration seed"
    if max(means) > end:
        note += "; ▲ above the range"
    axes.set_xlabel(f"bytes touched, % of the linears' dense bytes (realised)\n{note}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="major", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    return handles


def _curve(section: Section, method: str) -> list[tuple[float, Spread]]:
    """Returns (bytes touched in %, perplexity) of a method by budget; infinite perplexities are drawn as huge."""
    points = []
    for budget in section.sparsities:
        x = section.spread(method, budget, realised_sparsity)
        y = section.spread(method, budget, perplexity)
        if x is not None and y is not None:
            points.append((100 * (1 - x.mean), y if math.isfinite(y.mean) else Spread(1e300, None, y.seeds)))
    return points


def _end(section: Section) -> float:
    """Returns where the range of perplexities ends at the latest."""
    best = []
    for budget in section.sparsities:
        means = [s.mean for method in section.methods if (s := section.spread(method, budget, perplexity)) is not None]
        best += [min(means)] if means and math.isfinite(min(means)) else []
    return _HEADROOM * max(best) if best else math.inf


def _set_axis(axes: Any, low: float, high: float) -> float:
    """Sets range and scale of the perplexities, with some room at both ends; returns the upper end."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if high / low > _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        room = (high / low) ** _ROOM
        axes.set_ylim(low / room, high * room)
    else:
        room = _ROOM * max(high - low, 1e-3 * low)
        axes.set_ylim(low - room, high + room)
    return float(axes.get_ylim()[1])


def _style(index: int) -> dict[str, Any]:
    """Returns colour, marker and line of the index-th method: told apart also where colours repeat, or without any."""
    line = ("-", "--", ":")[index // 10 % 3]
    return {"color": f"C{index % 10}", "marker": _MARKERS[index % len(_MARKERS)], "linestyle": line}
