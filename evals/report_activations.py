"""The section of a report about activations and spectra, from what `sparsify inspect --activations` stored."""

import math
from typing import Any

from sparsify.evals.report_page import Grid, Painter, Part, Picture
from sparsify.evals.report_results import Results, Subject
from sparsify.evals.report_text import NONE, place, share

_COLUMNS = 2


def activations_part(subject: Subject, results: Results, painter: Painter) -> Part:
    """Returns the section."""
    part = Part("activations", "Activations and spectra")
    part.blocks = [*_energy(subject)]
    stored = results.of("activations")
    if not stored:
        what = "Thresholds in the activations, singular values, and sparsity by position."
        part.missing.append((what, subject.command("activations")))
        return part
    with stored[0].reading() as data:
        part.blocks.append(
            f"Collected on {data['tokens']:,} tokens of {data['text']} in {data['windows']} windows of "
            f"{data['seq_len']}, every token sparse."
        )
        if any(linear["histogram"] for linear in data["activations"].values()):
            part.blocks.append(_histograms(data, painter))
        else:
            part.blocks.append("No linear has a fixed threshold on its inputs, so there are no histograms.")
        part.blocks += [_positions(data, painter), _spectra(data, painter)]
    return part


def _energy(subject: Subject) -> list[Grid]:
    """Returns the ranks that hold 50, 90 and 99% of ‖W‖², where the conversion looked at singular values."""
    kinds: dict[str, list[tuple[list[int | None], int, int]]] = {}
    shapes = {linear.name: min(linear.outputs, linear.inputs) for linear in subject.ledger.linears}
    for name in shapes:
        entry = subject.config.linears[name]
        if entry.energy_ranks is not None:
            kinds.setdefault(place(name)[1], []).append((entry.energy_ranks, shapes[name], entry.rank))
    rows = [
        (
            kind, *(_mean_rank([ranks[i] for ranks, _, _ in found]) for i in range(3)),
            f"{sum(full for _, full, _ in found) / len(found):.0f}",
            f"{sum(chosen for *_, chosen in found) / len(found):.0f}",
        )
        for kind, found in kinds.items()
    ]  # fmt: skip
    title = "Ranks that hold 50, 90 and 99% of a weight's energy, means over layers"
    return [Grid(title, ("", "50%", "90%", "99%", "full rank", "chosen"), rows)] if rows else []


def _mean_rank(ranks: list[int | None]) -> str:
    """Returns the mean, "-" where a randomised SVD left one unknown."""
    known = [rank for rank in ranks if rank is not None]
    return f"{sum(known) / len(known):.0f}" if len(known) == len(ranks) else NONE


def _histograms(data: dict[str, Any], painter: Painter) -> Picture:
    low, high, bins = data["bins"]
    centres = [low + (high - low) * (index + 0.5) / bins for index in range(bins)]
    kinds: dict[str, list[tuple[int | None, dict[str, Any]]]] = {}
    for name, linear in data["activations"].items():
        if linear["histogram"]:
            layer, kind = place(name)
            kinds.setdefault(kind, []).append((layer, linear))

    def paint(figure: Any) -> None:
        columns = min(_COLUMNS, len(kinds))
        panels = list(figure.subplots(math.ceil(len(kinds) / columns), columns, squeeze=False, sharex=True).flat)
        for axes, (kind, found) in zip(panels, kinds.items(), strict=False):
            chosen = {0, len(found) // 2, len(found) - 1}
            for order, index in enumerate(sorted(chosen)):
                layer, linear = found[index]
                heights = [100 * value for value in linear["histogram"]]
                axes.plot(centres, heights, "-" if order == 0 else "--" if order == 1 else ":", label=f"layer {layer}")
            axes.axvline(0.0, color="#c0392b", linewidth=1.2)
            axes.set_title(kind, fontsize=9, loc="left")
            axes.set_ylabel("% of channels")
            axes.legend(frameon=False, fontsize=7, loc="upper left")
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[max(0, len(kinds) - columns) : len(kinds)]:
            axes.tick_params(labelbottom=True)
        for axes in panels[len(kinds) :]:
            axes.set_axis_off()
        figure.supxlabel("log10 of score / threshold (red line: the threshold; right of it is kept)", fontsize=9)

    rows = math.ceil(len(kinds) / _COLUMNS)
    return painter.draw(
        "activations", (6.6, 0.7 + 1.75 * rows), paint,
        alt=f"Histograms of scores over their threshold for {', '.join(kinds)}: first, middle and last layer.",
        caption="Scores against the threshold of their linear: what is right of the red line is kept.",
    )  # fmt: skip


def _positions(data: dict[str, Any], painter: Painter) -> Picture:
    found = [100 * value for value in data["sparsity_by_position"]]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(range(len(found)), found, color="#1b7f79", linewidth=1, label="realised")
        axes.axhline(100 * data["weighted_sparsity"], color="#7d848b", label="weighted")
        axes.axhline(100 * data["nominal_sparsity"], color="#c0392b", linestyle=":", label="nominal")
        axes.set_xlabel("position of the token in its window")
        axes.set_ylabel("sparsity, %")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)

    mean = sum(found) / len(found)
    return painter.draw(
        "positions", (6.2, 3.2), paint,
        alt=f"Realised sparsity by position: {mean:.1f}% on average, {found[0]:.1f}% at the first token, "
        f"nominal {share(data['nominal_sparsity'])}.",
        caption="Realised against nominal sparsity by the position of a token.",
    )  # fmt: skip


def _spectra(data: dict[str, Any], painter: Painter) -> Picture:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    spectra = data["singular_values"]
    layers = {place(name)[0] for name in spectra}

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, (name, found) in enumerate(spectra.items()):
            (line,) = axes.plot(found["at"], found["values"], label=place(name)[1], color=f"C{index % 10}")
            if found["rank"]:
                nearest = min(range(len(found["at"])), key=lambda i: abs(found["at"][i] - found["rank"]))
                axes.plot([found["rank"]], [found["values"][nearest]], "o", color=line.get_color(), markersize=6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        # matplotlib's own labels of such axes are formulas, and a page shows no formula (report_page).
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("rank")
        axes.set_ylabel("singular value / the largest")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)

    ranks = ", ".join(f"{place(name)[1]} {found['rank']}" for name, found in spectra.items())
    where = ", ".join(f"layer {layer}" for layer in sorted(layers, key=str))
    return painter.draw(
        "spectra", (6.6, 3.4), paint, alt=f"Decay of singular values of {where}; chosen ranks: {ranks}.",
        caption=f"Singular values of the linears of {where}; a dot is the rank that was chosen (none: no low rank).",
    )  # fmt: skip
