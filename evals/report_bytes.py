"""The section of a report about bytes and linears: the ledger, and pictures of every linear's share."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sparsify.evals.report_page import Grid, Painter, Part, Picture
from sparsify.evals.report_results import Results, Subject
from sparsify.evals.report_text import NONE, place, share, size
from sparsify.ledger import Ledger, LinearBytes

# Beyond this many layers numbers in the fields would be too small: the colour bar says them.
_LABELLED = 48
_COLOURS = 64


def bytes_part(subject: Subject, results: Results, painter: Painter) -> Part:
    """Returns the section."""
    part = Part("bytes", "Bytes and linears")
    densities, where = _realised(results)
    counted = None if densities is None else subject.ledger.with_densities(densities)
    part.blocks.append(
        f"Realised is of {where}." if where else "Realised sparsity by linear is not known: no perplexity is stored."
    )
    part.blocks += [
        Grid(
            "Weight bytes that one token touches, by projection", _HEADER, list(_rows(subject, counted, by_layer=False))
        ),
        Grid("By layer", _HEADER, list(_rows(subject, counted, by_layer=True)), folded=True),
        Grid("Every linear", _LINEAR_HEADER, list(_linears(subject, counted)), folded=True),
    ]
    if where is None:
        part.missing.append(("Realised sparsity by linear.", subject.command("perplexity")))
    if not any(entry.rank for entry in subject.config.linears.values()):
        part.blocks.append("No linear has a low-rank product, so there is no picture of ranks.")
    part.blocks += _heatmaps(subject, painter)
    return part


_HEADER = ("", "linears", "dense", "sparse", "nominal", "weighted", "realised", "mean rank", "mean error")
_LINEAR_HEADER = (
    "linear", "shape", "dense", "sparse", "weighted", "realised", "rho", "rank", "density", "error",
    "ranks of 50, 90, 99% energy",
)  # fmt: skip


def _realised(results: Results) -> tuple[dict[str, float] | None, str | None]:
    """Returns densities by linear and the text they were counted on, from the first result that has them."""
    for stored in results.of("perplexity"):
        with stored.reading() as data:
            for entry in data["models"]:
                if "sparse" in entry:
                    return dict(
                        entry["realised_densities"]
                    ), f"{entry['sparse']['text']}, {entry['sparse']['protocol']}"
    for stored in results.of("activations"):
        with stored.reading() as data:
            found = {name: linear["density"] for name, linear in data["activations"].items()}
            return found, f"{data['tokens']:,} tokens of {data['text']}"
    return None, None


def _rows(subject: Subject, counted: Ledger | None, *, by_layer: bool) -> Iterator[tuple[str, ...]]:
    groups: dict[str, list[LinearBytes]] = {}
    for linear in subject.ledger.linears:
        layer, kind = place(linear.name)
        groups.setdefault((NONE if layer is None else f"layer {layer}") if by_layer else kind, []).append(linear)
    realised = {} if counted is None else {linear.name: linear for linear in counted.linears}
    for name, linears in groups.items():
        yield _row(name, linears, realised, subject)
    ledger = subject.ledger
    yield _row("converted linears", list(ledger.linears), realised, subject)
    yield ("everything else", NONE, size(ledger.rest_bytes), size(ledger.rest_bytes), *(NONE,) * 5)
    whole = ledger.dense_bytes + ledger.rest_bytes
    yield (
        "all", NONE, size(whole), size(ledger.touched_bytes + ledger.rest_bytes), NONE, share(ledger.model_sparsity),
        NONE if counted is None else share(counted.model_sparsity), NONE, NONE,
    )  # fmt: skip


def _row(
    name: str, linears: list[LinearBytes], realised: Mapping[str, LinearBytes], subject: Subject
) -> tuple[str, ...]:
    dense, touched = sum(x.dense_bytes for x in linears), sum(x.touched_bytes for x in linears)
    entries = [subject.config.linears[linear.name] for linear in linears]
    asked = sum(e.sparsity * x.dense_bytes for e, x in zip(entries, linears, strict=True)) / dense
    really = 1 - sum(realised[x.name].touched_bytes for x in linears) / dense if realised else None
    rank = sum(entry.rank for entry in entries) / len(entries)
    error = sum(entry.error for entry in entries) / len(entries)
    return (
        name, str(len(linears)), size(dense), size(touched), share(asked), share(1 - touched / dense), share(really),
        f"{rank:.0f}", share(error, 2),
    )  # fmt: skip


def _linears(subject: Subject, counted: Ledger | None) -> Iterator[tuple[str, ...]]:
    realised = {} if counted is None else {linear.name: linear for linear in counted.linears}
    for x in subject.ledger.linears:
        entry = subject.config.linears[x.name]
        really = 1 - realised[x.name].touched_bytes / x.dense_bytes if realised else None
        yield (
            x.name, f"{x.outputs}×{x.inputs}", size(x.dense_bytes), size(x.touched_bytes),
            share(1 - x.touched_bytes / x.dense_bytes), share(really), f"{entry.rho:g}", str(entry.rank),
            share(entry.density), share(entry.error, 2),
            ", ".join(NONE if rank is None else str(rank) for rank in entry.energy_ranks or [None]),
        )  # fmt: skip


def _heatmaps(subject: Subject, painter: Painter) -> Iterator[Picture]:
    config = subject.config
    saved = {x.name: 100 * (1 - x.touched_bytes / x.dense_bytes) for x in subject.ledger.linears}
    maps: tuple[tuple[str, str, str, Callable[[str], float]], ...] = (
        ("sparsity", "Weighted sparsity of every linear, % of its bytes", "{:.0f}", lambda name: saved[name]),
        ("density", "Channels that a token uses, % (calibrated)", "{:.0f}", lambda n: 100 * config.linears[n].density),
        ("rank", "Rank of the low-rank product", "{:.0f}", lambda name: float(config.linears[name].rank)),
        ("error", "Relative output error on calibration text, %", "{:.2g}", lambda n: 100 * config.linears[n].error),
    )
    for name, title, form, value in maps:
        # The ledger has the linears in the model's order.
        values = {linear.name: value(linear.name) for linear in subject.ledger.linears}
        if name != "rank" or any(values.values()):
            yield _heatmap(name, title, form, values, 100.0 if name in ("sparsity", "density") else None, painter)


def _heatmap(
    name: str, title: str, form: str, values: dict[str, float], top: float | None, painter: Painter
) -> Picture:
    places = {linear: place(linear) for linear in values}
    layers = sorted({layer for layer, _ in places.values() if layer is not None})
    outside = [kind for layer, kind in places.values() if layer is None]
    rows = [*map(str, layers), *([NONE] if outside else [])]
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = [[math.nan] * len(kinds) for _ in rows]
    for linear, (layer, kind) in places.items():
        grid[len(layers) if layer is None else layers.index(layer)][kinds.index(kind)] = values[linear]

    def paint(figure: Any) -> None:
        from matplotlib import colormaps

        axes = figure.subplots()
        # From 0, so that a map that is flat is one colour, and not noise blown up to the whole range.
        high = top or max(values.values()) or 1.0
        # As paths: pictures in a picture would not load.
        image = axes.pcolormesh(
            grid,
            cmap=colormaps["viridis"].resampled(_COLOURS),
            vmin=0.0,
            vmax=high,
            edgecolors="white",
            linewidth=0.5,
            rasterized=False,
        )
        axes.invert_yaxis()
        axes.set_xticks([x + 0.5 for x in range(len(kinds))], kinds, rotation=90)
        step = math.ceil(len(rows) / _LABELLED)
        axes.set_yticks([y + 0.5 for y in range(0, len(rows), step)], rows[::step])
        axes.set_ylabel("layer")
        if len(rows) <= _LABELLED:
            for y, row in enumerate(grid):
                for x, number in enumerate(row):
                    if not math.isnan(number):
                        colour = "white" if number < 0.6 * high else "black"
                        axes.text(
                            x + 0.5, y + 0.5, form.format(number), ha="center", va="center", fontsize=8, color=colour
                        )
        axes.set_title(title, fontsize=9, loc="left")
        bar = figure.colorbar(image, ax=axes)
        bar.solids.set(rasterized=False, edgecolor="face")

    low, high = min(values, key=lambda n: values[n]), max(values, key=lambda n: values[n])
    said = f"from {form.format(values[low])} ({low}) to {form.format(values[high])} ({high})"
    height = 1.9 + 0.27 * min(len(rows), _LABELLED)
    width = 2.4 + 0.62 * len(kinds)
    return painter.draw(
        f"heatmap-{name}", (max(width, 4.6), height), paint, alt=f"{title}, by layer and projection: {said}.",
        caption=f"{title}, by layer and projection.",
    )  # fmt: skip
