"""The section of a report about quality: perplexity, tasks, PPL-p%, and where this model stands among others."""

from collections.abc import Iterator
from typing import Any

from sparsify.evals import comparison_plot, sweep_plot
from sparsify.evals.comparison_summary import Section, Spread, perplexity, sections
from sparsify.evals.report_page import Grid, Painter, Part, Picture
from sparsify.evals.report_results import Results, Stored, Subject
from sparsify.evals.report_text import NONE, share, size, task_score
from sparsify.evals.report_text import perplexity as shown
from sparsify.evals.sweep import Frontier, Point, marks

_MISSING = {
    "perplexity": "Perplexity, dense and sparse.",
    "tasks": "Tasks of lm-eval.",
    "ppl-p": "PPL-p% sparsity of the dense model.",
    "comparison": "Other methods and budgets on the same model.",
    "sweep": "The frontier of this method over many budgets.",
}


def quality_part(subject: Subject, results: Results, painter: Painter) -> Part:
    """Returns the section."""
    part = Part("quality", "Quality")
    for kind in _MISSING:
        stored = results.of(kind)
        if not stored:
            part.missing.append((_MISSING[kind], subject.command(kind)))
        for number, result in enumerate(stored):
            with result.reading():
                _add(part, subject, result, painter, f"-{number + 1}" if number else "")
    return part


def _add(part: Part, subject: Subject, result: Stored, painter: Painter, suffix: str) -> None:
    data = result.data
    if result.kind == "perplexity":
        for entry in data["models"]:
            part.blocks += [_perplexity(entry), _protocol(entry)]
    elif result.kind == "tasks":
        for index, entry in enumerate(data["models"]):
            name = f"tasks{suffix}{f'-{index + 1}' if index else ''}"
            part.blocks += [_tasks(entry), _task_note(entry), _task_picture(entry, painter, name)]
    elif result.kind == "ppl-p":
        part.blocks += [_ppl_p(data), _ppl_p_picture(data, painter, f"ppl-p{suffix}")]
    elif result.kind == "comparison":
        found = sections(data["cells"])
        part.blocks += [_comparison(section, subject) for section in found if section.entries]
        part.blocks += _comparison_picture(found, painter, f"comparison{suffix}")
    else:
        frontier = Frontier(**data_of_frontier(data))
        part.blocks += [_frontier(frontier), _frontier_picture(frontier, painter, f"frontier{suffix}")]


def data_of_frontier(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a Frontier from what `sweep` saved, in its folder or with --save."""
    fields = {name: value for name, value in data.items() if name != "out"}
    return fields | {"points": tuple(Point(**point) for point in data["points"])}


def _perplexity(entry: dict[str, Any]) -> Grid:
    sides = [("dense", entry["dense"], (NONE, NONE, NONE), entry["dense_bytes_per_token"])]
    if "sparse" in entry:
        shares = (
            share(entry["nominal_sparsity"]), share(entry["weighted_sparsity"]), share(entry["realised_sparsity"]),
        )  # fmt: skip
        sides.append(("sparse", entry["sparse"], shares, entry["touched_bytes_per_token"]))
    rows = [
        (name, shown(side["perplexity"]), f"{side['bits_per_byte']:.4f}", *shares, size(count))
        for name, side, shares, count in sides
    ]
    header = ("", "perplexity", "bits/byte", "nominal", "weighted", "realised", "bytes/token")
    return Grid(f"Perplexity, {entry['dense']['text']}, {entry['dense']['protocol']}", header, rows)


def _protocol(entry: dict[str, Any]) -> str:
    about = entry.get("sparse") or entry["dense"]
    rise = ""
    if "sparse" in entry:
        over = entry["perplexity_ratio"] - 1.0
        rise = f"Sparse is {share(abs(over), 2)} {'below' if over < 0.0 else 'above'} dense. "
    return (
        f"{rise}{about['text']}: {about['tokens']:,} tokens scored in {about['windows']} windows of "
        f"{about['seq_len']}, stride {about['stride']}. Protocol {about['protocol']}: {about['scored']}."
    )


def _label(score: dict[str, Any]) -> str:
    filtered = "" if score["filter"] == "none" else f", {score['filter']}"
    return f"{score['task']}, {score['metric']}{filtered}"


def _tasks(entry: dict[str, Any]) -> Grid:
    rows = [
        (
            _label(score), task_score(score["dense"]), task_score(score.get("sparse")), share(score.get("recovery")),
            _difference(score), str(score["documents"] or NONE),
        )
        for score in entry["scores"]
    ]  # fmt: skip
    header = ("task, metric", "dense", "sparse", "recovery", "paired difference", "documents")
    return Grid(f"Tasks of lm-eval, {entry['protocol']}", header, rows)


def _difference(score: dict[str, Any]) -> str:
    if score.get("difference") is None:
        return NONE
    return f"{score['difference']:+.4f} ± {score['difference_stderr']:.4f}"


def _task_note(entry: dict[str, Any]) -> str:
    shares = [
        f"{name} {share(task['realised_sparsity'])}"
        for name, task in entry["tasks"].items()
        if task.get("realised_sparsity") is not None
    ]
    limit = "All documents" if entry["limit"] is None else f"The first {entry['limit']} documents of a task"
    realised = f" Realised sparsity: {', '.join(shares)}." if shares else ""
    return (
        f"Protocol {entry['protocol']}: {entry['statement']}. {limit}, {entry['dtype']}, batch size "
        f"{entry['batch_size']}; ± is lm-eval's standard error.{realised}"
    )


def _task_picture(entry: dict[str, Any], painter: Painter, name: str) -> Picture:
    scores = [score for score in entry["scores"] if abs(score["dense"]["value"]) <= 1.0]
    # Perplexity-like measures have a range of their own; the table holds them.
    scores = scores or entry["scores"]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for offset, side, colour, marker in ((0.14, "dense", "#7d848b", "o"), (-0.14, "sparse", "#1b7f79", "s")):
            rows = [(len(scores) - 1 - i + offset, score[side]) for i, score in enumerate(scores) if side in score]
            if rows:
                axes.errorbar(
                    [found["value"] for _, found in rows], [y for y, _ in rows],
                    xerr=[found["stderr"] or 0.0 for _, found in rows],
                    fmt=marker, color=colour, capsize=3, label=side, markersize=5,
                )  # fmt: skip
        axes.set_yticks(range(len(scores)), [_label(score) for score in reversed(scores)])
        axes.set_ylim(-0.6, len(scores) - 0.4)
        axes.set_xlabel("score, ± 1 standard error")
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower right", ncols=2, frameon=False)

    said = "; ".join(
        f"{_label(s)} dense {task_score(s['dense'])}, sparse {task_score(s.get('sparse'))}" for s in scores
    )
    return painter.draw(
        name, (6.4, 1.4 + 0.36 * len(scores)), paint, alt=f"Scores dense and sparse: {said}.",
        caption="Scores of lm-eval's tasks, dense and sparse, with standard errors.",
    )  # fmt: skip


def _ppl_p(data: dict[str, Any]) -> Grid:
    rows = [("dense", NONE, share(0.0), shown(data["dense"]["perplexity"]), NONE)]
    for point in data["points"]:
        tolerance = NONE if point["p"] is None else f"{100 * point['p']:g}%"
        rows.append(
            (point["rule"], tolerance, share(point["sparsity"], 2), shown(point["perplexity"]), share(point["rise"], 3))
        )
    header = ("rule", "p", "sparsity", "perplexity", "rise")
    return Grid(f"{data['metric']} of the dense model, {data['dense']['text']}", header, rows)


def _ppl_p_picture(data: dict[str, Any], painter: Painter, name: str) -> Picture:
    points = data["points"]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for index, rule in enumerate(dict.fromkeys(point["rule"] for point in points)):
            own = sorted((p for p in points if p["rule"] == rule), key=lambda p: float(p["sparsity"]))
            axes.plot(
                [100 * p["sparsity"] for p in own], [100 * p["rise"] for p in own], marker="osD^"[index % 4], label=rule
            )
        axes.set_xlabel(f"sparsity, % of {'neurons' if data['scope'] == 'mlp' else 'channels'}")
        axes.set_ylabel("rise of perplexity, %")
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)

    said = ", ".join(f"{p['rule']} {share(p['sparsity'])} at a rise of {share(p['rise'], 2)}" for p in points)
    return painter.draw(
        name, (5.8, 3.4), paint, alt=f"Rise of perplexity by sparsity: {said}.",
        caption=f"{data['metric']}: what the dense model could leave out, by the rise of its perplexity.",
    )  # fmt: skip


def _comparison(section: Section, subject: Subject) -> Grid:
    config, budgets = subject.config, section.sparsities
    rows, marked = [], set()
    for method in section.methods:
        own = method.partition("@")[0].partition(":")[0] == config.method
        rows.append((f"{method} (this checkpoint's method)" if own else method, *_budgets(section, method)))
        marked |= {len(rows) - 1} if own else set()
    key = section.key
    dense = NONE if section.dense is None else shown(perplexity(section.dense))
    title = f"Perplexity by method and budget, {key['text']}, {key['protocol']}; dense {dense}"
    return Grid(title, ("method", *(share(b, 0) for b in budgets)), rows, marked=frozenset(marked))


def _budgets(section: Section, method: str) -> Iterator[str]:
    for budget in section.sparsities:
        found: Spread | None = section.spread(method, budget, perplexity)
        entry = section.entries.get((method, budget))
        if found is not None:
            yield shown(found.mean) + ("" if found.std is None else f" ± {found.std:.3f}")
        else:
            yield "refused" if entry is not None and entry.refused else NONE


def _comparison_picture(found: list[Section], painter: Painter, name: str) -> list[Picture]:
    if not any(entry.cells for section in found for entry in section.entries.values()):
        return []
    methods = dict.fromkeys(method for section in found for method in section.methods)
    return [
        painter.save(
            name, lambda path: comparison_plot.save_plot(found, [path]),
            alt=f"Perplexity against bytes touched for {', '.join(methods)}; the table above holds the numbers.",
            caption="Perplexity against the bytes that each method really touches, over its budgets.",
        )
    ]  # fmt: skip


def _frontier(frontier: Frontier) -> Grid:
    rows = [
        (
            share(p.sparsity), share(p.realised_sparsity), size(p.bytes), shown(p.perplexity), f"{p.increase:+.2%}",
            NONE if p.predicted_speedup is None else f"{p.predicted_speedup:.2f}", ", ".join(marks(frontier, p)),
        )
        for p in frontier.points
    ]  # fmt: skip
    header = ("sparsity", "realised", "bytes/token", "perplexity", "increase", "predicted speed-up", "")
    title = f"Frontier of {frontier.method}, {frontier.tokens:,} tokens of {frontier.text}"
    return Grid(title, header, rows, left=0)


def _frontier_picture(frontier: Frontier, painter: Painter, name: str) -> Picture:
    said = ", ".join(f"{share(p.sparsity, 0)} {shown(p.perplexity)}" for p in frontier.points)
    return painter.save(
        name, lambda path: sweep_plot.save_plot(frontier, path),
        alt=f"Perplexity by sparsity: {said}.",
        caption="The frontier: perplexity by the weight bytes that a token touches.",
    )  # fmt: skip
