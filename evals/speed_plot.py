"""A picture of `speed`: the time of a token on each side, and the time that memory alone would take."""

from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError, UnavailableError

_COLOURS = {True: "#1b7f79", False: "#9a9fa6"}


def check_plot(path: Path) -> None:
    """Raises UnavailableError without matplotlib, SparsifyError for a file that cannot be; before hours of work."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise SparsifyError(f"--plot {path} is not a file in an existing folder")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise SparsifyError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnavailableError("--plot needs matplotlib: pip install 'sparsify-llm[report]'") from None


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draws the sides of `Speed.to_dict`; result["title"] says what was measured."""
    # Not pyplot: it keeps state and looks for a display.
    from matplotlib.figure import Figure

    sides = result["sides"]
    names = list(sides)[::-1]
    figure = Figure(figsize=(8.0, 1.7 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        side = sides[name]
        ms = side["ms_per_step"]
        spread = [[ms["median"] - ms["p10"]], [ms["p90"] - ms["median"]]]
        axes.barh(row, ms["median"], xerr=spread, height=0.6, color=_COLOURS[side["sparse"]], capsize=3)
        axes.text(ms["p90"], row, f"  {ms['median']:.2f} ms", va="center", fontsize=9)
        axes.vlines(side["limit_ms"], row - 0.42, row + 0.42, color="#c0392b", linewidth=2)
    axes.vlines(
        [], 0, 0, color="#c0392b", linewidth=2, label="memory limit: touched weight bytes at the stream's speed"
    )
    axes.set_yticks(range(len(names)), [_label(name, sides[name]) for name in names])
    axes.set_xlim(0, 1.18 * max(side["ms_per_step"]["p90"] for side in sides.values()))
    axes.set_xlabel("ms per step, median with p10 to p90")
    axes.set_title(_title(result), fontsize=10, loc="left")
    figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _label(name: str, side: dict[str, Any]) -> str:
    return f"{name}, {side['touched']['realised_sparsity']:.0%} sparse" if side["sparse"] else name


def _title(result: dict[str, Any]) -> str:
    return (
        f"{result['title']}, {result['dtype']}, batch {result['batch']}, context {result['prompt_tokens']}\n"
        f"{result['cpu']}, {result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    )
