"""The section of a report about speed: a decoded token on every side, and where dense is faster."""

from typing import Any

from sparsify.evals import speed_plot
from sparsify.evals.report_page import Grid, Painter, Part, Picture
from sparsify.evals.report_results import Results, Subject
from sparsify.evals.report_text import NONE, share, size


def speed_part(subject: Subject, results: Results, painter: Painter) -> Part:
    """Returns the section."""
    part = Part("speed", "Speed")
    for number, result in enumerate(results.of("speed")):
        with result.reading() as data:
            part.blocks += [text for text in (data["statement"], _busy(data), _cached(data)) if text]
            part.blocks += [_sides(data), _ratios(data), _conditions(data)]
            part.blocks.append(_speed_picture(data, painter, f"speed-{number + 1}" if number else "speed"))
    for number, result in enumerate(results.of("crossover")):
        with result.reading() as data:
            name = f"crossover-{number + 1}" if number else "crossover"
            part.blocks += [_crossover(data), _crossover_picture(data, painter, name)]
    for kind, what in (("speed", "The time of a token, dense and sparse."), ("crossover", "Where dense is faster.")):
        if not results.of(kind):
            part.missing.append((what, subject.command(kind)))
    return part


def _sides(data: dict[str, Any]) -> Grid:
    rows = []
    for name, side in data["sides"].items():
        ms, touched = side["ms_per_step"], side["touched"]
        rows.append(
            (
                name, f"{ms['median']:.2f}", f"{ms['p10']:.2f} to {ms['p90']:.2f}", f"{side['limit_ms']:.2f}",
                f"{side['tokens_per_second']:.1f}", size(touched["bytes_per_step"]),
                share(touched["realised_sparsity"]), f"{side['gb_per_second']:.1f}",
                share(side["share_of_stream"]["median"], 0),
            )
        )  # fmt: skip
    header = (
        "", "ms/step", "p10 to p90", "memory limit, ms", "tokens/s", "weights/step", "realised", "GB/s", "of stream",
    )  # fmt: skip
    return Grid("Decoding, all sides in turns in one run", header, rows)


def _ratios(data: dict[str, Any]) -> Grid:
    names = list(data["sides"])
    rows = [
        (name, *(NONE if other == name else f"{data['ratios'][name][other]['median']:.2f}×" for other in names))
        for name in names
    ]
    return Grid("Times as fast, row over column", ("", *names), rows)


def _conditions(data: dict[str, Any]) -> str:
    stream = data["stream"]
    return (
        f"{_machine(data)}, {data['dtype']}, batch {data['batch']}, prompt {data['prompt_tokens']}, {data['rounds']} "
        f"rounds of {data['new_tokens']} steps, {data['date']}; a stream {stream['kind']} moves "
        f"{stream['gb_per_second']['median']:.1f} GB/s. The memory limit is the time that the stream takes for the "
        f"weights of a step. Protocol: {data['protocol']}."
    )


def _machine(data: dict[str, Any]) -> str:
    return f"{data['device']}, {data['cpu']}, {data['threads']} thread{'s' if data['threads'] > 1 else ''}"


def _busy(data: dict[str, Any]) -> str | None:
    waited = data["waited_for_cpu"]
    if waited is None or waited < 0.05:
        return None
    return f"The machine was busy: in a second of this measurement its threads waited {waited:.2f} s for a CPU."


def _cached(data: dict[str, Any]) -> str | None:
    fitting = [name for name, side in data["sides"].items() if side["fits_in_cache"]]
    if not fitting:
        return None
    return (
        f"The weights of {', '.join(fitting)} fit in the last-level cache: this is the cache's speed, and a larger "
        "model behaves differently."
    )


def _speed_picture(data: dict[str, Any], painter: Painter, name: str) -> Picture:
    said = ", ".join(f"{side} {found['ms_per_step']['median']:.2f} ms" for side, found in data["sides"].items())
    return painter.save(
        name, lambda path: speed_plot.save_plot(data, path), alt=f"Time of a decoded step: {said}.",
        caption="Time of a decoded step on each side; the red line is what memory alone would take.",
    )  # fmt: skip


def _cells(data: dict[str, Any]) -> tuple[list[int], list[float], dict[tuple[int, float], dict[str, Any]]]:
    cells = {(cell["batch"], cell["sparsity"]): cell for cell in data["cells"]}
    return sorted({batch for batch, _ in cells}), sorted({sparsity for _, sparsity in cells}), cells


def _crossover(data: dict[str, Any]) -> Grid:
    batches, sparsities, cells = _cells(data)
    shown = {at: f"{cell['ratio']['median']:.2f} {cell['faster']}" for at, cell in cells.items()}
    rows = [(str(batch), *(shown.get((batch, s), NONE) for s in sparsities)) for batch in batches]
    title = f"Dense over sparse time, {data['linear']} {data['outputs']}×{data['inputs']}, {_machine(data)}"
    return Grid(title, ("tokens at once", *(share(s, 0) for s in sparsities)), rows)


def _crossover_picture(data: dict[str, Any], painter: Painter, name: str) -> Picture:
    batches, sparsities, cells = _cells(data)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, batch in enumerate(batches):
            own = [(s, cells[batch, s]["ratio"]["median"]) for s in sparsities if (batch, s) in cells]
            label = f"{batch} token{'s' if batch > 1 else ''}"
            axes.plot([100 * s for s, _ in own], [y for _, y in own], marker="osD^v"[index % 5], label=label)
        axes.axhline(1.0, color="#444444", linestyle="--", linewidth=1)
        axes.set_xlabel("sparsity of channels, %")
        axes.set_ylabel("dense time / sparse time")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, title="at once")

    even = [f"{batch} at once from {_first(batch, sparsities, cells)}" for batch in batches]
    return painter.draw(
        name, (5.8, 3.4), paint,
        alt=f"Dense over sparse time by sparsity and tokens at once; sparse is faster: {', '.join(even)}.",
        caption="Where sparse is faster (above 1), by tokens at once and sparsity.",
    )  # fmt: skip


def _first(batch: int, sparsities: list[float], cells: dict[tuple[int, float], dict[str, Any]]) -> str:
    won = [s for s in sparsities if (batch, s) in cells and cells[batch, s]["faster"] == "sparse"]
    return share(min(won), 0) if won else "nowhere"
