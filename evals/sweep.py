"""The frontier of one method on one model: perplexity by the bytes that a token really touches, over many budgets.

The points are the cells of `compare`, in a file for each text and setting, so a sweep that was stopped goes on where it
was. Two points are marked: the knee, which is the furthest below the line between dense and the sparsest in (bytes,
log-perplexity), and the sparsest whose rise stays within a limit. Not covered: several methods at once (`compare`).
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sparsify.errors import SparsifyError
from sparsify.evals.compare import Settings, Subject, run
from sparsify.evals.cost_table import CostTable
from sparsify.ledger import LinearBytes, rest_bytes
from sparsify.processes import ONE, Processes

_MOST_POINTS = 100


@dataclass(frozen=True)
class Point:
    """One budget. bytes: of weights that a token really touched; increase: of perplexity over dense, a share."""

    sparsity: float
    realised_sparsity: float
    bytes: int
    perplexity: float
    increase: float
    predicted_speedup: float | None


@dataclass(frozen=True)
class Frontier:
    """All points from dense to the sparsest; refused: why a method could not meet a sparsity, by sparsity."""

    model: str
    method: str
    text: str
    tokens: int
    calibration: str
    points: tuple[Point, ...]
    refused: dict[str, str]
    max_increase: float | None
    knee: float | None
    sparsest_within: float | None
    model_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_sparsities(text: str) -> list[float]:
    """Returns the sparsities of "0.3..0.8" (steps of 0.1), "0.3..0.8:0.05" or "0.3,0.5".

    Raises SparsifyError for other text, and sparsities outside (0, 1).
    """
    allowed = "write 0.3..0.8, 0.3..0.8:0.05 or 0.3,0.5, each in (0, 1)"
    try:
        if ".." in text:
            span, _, step = text.partition(":")
            first, last = map(float, span.split(".."))
            width = float(step) if step else 0.1
            if not (width > 0.0 and first <= last and (last - first) / width < _MOST_POINTS):
                raise ValueError(text)
            found = [round(first + index * width, 6) for index in range(math.floor((last - first) / width + 1e-9) + 1)]
        else:
            found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise SparsifyError(f"sparsities {text!r} cannot be read: {allowed}") from None
    if not all(0.0 < sparsity < 1.0 for sparsity in found):
        raise SparsifyError(f"sparsities {text!r} leave (0, 1): {allowed}")
    return found


def sweep(
    subject: Subject,
    method: str,
    sparsities: Sequence[float],
    *,
    out: Path,
    settings: Settings,
    model: PreTrainedModel,
    costs: CostTable | None = None,
    max_increase: float | None = None,
    processes: Processes = ONE,
) -> Frontier:
    """Measures the points that the folder `out` does not hold yet and returns the whole frontier.

    method: a label of `compare`, such as "auto" or "rsparse:rho=0.95@greedy"; model: the dense model, for its bytes;
    costs: predict a speed-up for each point; processes: measure a part of the points each.
    Raises SparsifyError as `compare.run` does, and for a folder with points of other weights, texts or versions.
    """
    cells = run(
        [subject],
        out=cells_file(out, subject, settings),
        methods=[method],
        sparsities=sparsities,
        settings=settings,
        processes=processes,
    )
    own = _of_this_run(cells, method, sparsities)
    dense = own[0]["result"]["quality"]
    total = rest_bytes(model)
    points = [Point(0.0, 0.0, total, dense["perplexity"], 0.0, None)]
    refused = {}
    for cell in own[1:]:
        if "refused" in cell:
            refused[f"{cell['key']['sparsity']:g}"] = cell["refused"]
            continue
        result = cell["result"]
        found = result["quality"]["perplexity"]
        points.append(
            Point(
                sparsity=cell["key"]["sparsity"],
                realised_sparsity=result["realised_sparsity"],
                bytes=round(total * (1.0 - result["realised_model_sparsity"])),
                perplexity=found,
                increase=found / dense["perplexity"] - 1.0,
                predicted_speedup=None if costs is None else costs.speedup_of(_shares(result["linears"], model)),
            )
        )
    return Frontier(
        model=subject.name,
        method=method,
        text=dense["text"],
        tokens=dense["tokens"],
        calibration=own[-1]["key"]["calibration"]["source"],
        points=tuple(points),
        refused=refused,
        max_increase=max_increase,
        knee=knee(points),
        sparsest_within=None if max_increase is None else sparsest_within(points, max_increase),
        model_sha256=own[0]["key"]["model_sha256"],
    )


def knee(points: Sequence[Point]) -> float | None:
    """Returns the sparsity of the point furthest below the line from dense to the sparsest, None where none is.

    Both axes, bytes and log-perplexity, go from 0 to 1 between the two ends.
    """
    if len(points) < 3:
        return None
    first, last = points[0], points[-1]
    saved, rise = first.bytes - last.bytes, math.log(last.perplexity / first.perplexity)
    if saved <= 0 or rise <= 0.0:
        return None
    gains = {
        p.sparsity: (first.bytes - p.bytes) / saved - math.log(p.perplexity / first.perplexity) / rise
        for p in points[1:-1]
    }
    best = max(gains, key=lambda sparsity: gains[sparsity])
    return best if gains[best] > 0.0 else None


def sparsest_within(points: Sequence[Point], max_increase: float) -> float | None:
    """Returns the largest sparsity whose rise of perplexity is at most max_increase, None where no point's is."""
    return max((p.sparsity for p in points if p.sparsity and p.increase <= max_increase), default=None)


def table(frontier: Frontier) -> str:
    """Returns the frontier as markdown."""
    lines = [
        f"{frontier.model}, {frontier.method}: perplexity on {frontier.tokens:,} tokens of {frontier.text}, every "
        f"token sparse, calibrated on {frontier.calibration}.",
        "",
        "| sparsity | realised | bytes a token | perplexity | increase | predicted speed-up | |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in frontier.points:
        speed = "–" if p.predicted_speedup is None else f"{p.predicted_speedup:.2f}"
        lines.append(
            f"| {p.sparsity:.1%} | {p.realised_sparsity:.1%} | {p.bytes:,} | {p.perplexity:.3f} | {p.increase:+.2%} | "
            f"{speed} | {', '.join(marks(frontier, p))} |"
        )
    lines += [f"| {float(s):.1%} | | | refused: {why} | | | |" for s, why in frontier.refused.items()]
    return "\n".join(lines) + "\n"


def marks(frontier: Frontier, point: Point) -> list[str]:
    """Returns what a point is marked as."""
    found = ["knee"] if point.sparsity == frontier.knee else []
    if point.sparsity == frontier.sparsest_within:
        found.append(f"sparsest within {100 * (frontier.max_increase or 0.0):g}%")
    return found


def cells_file(folder: Path, subject: Subject, settings: Settings) -> Path:
    """Returns the file of the points that are measured on these texts with these settings."""
    text = json.dumps([subject.name, subject.calibration, subject.evaluation, asdict(settings)], sort_keys=True)
    return folder / f"cells-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"


def _of_this_run(cells: Sequence[dict[str, Any]], method: str, sparsities: Sequence[float]) -> list[dict[str, Any]]:
    """Returns the dense cell and the method's, by sparsity."""
    own = ("model_sha256", "text_sha256", "sparsify_version")
    if len({tuple(cell["key"][name] for name in own) for cell in cells}) > 1:
        raise SparsifyError(
            "the folder of this sweep holds points of other weights, texts or another sparsify: name another --out"
        )
    wanted = [("dense", 0.0), *((method, sparsity) for sparsity in sorted(sparsities))]
    found = {(cell["key"]["method"], cell["key"]["sparsity"]): cell for cell in cells}
    return [found[key] for key in wanted]


def _shares(linears: Sequence[dict[str, Any]], model: PreTrainedModel) -> list[tuple[int, int, float]]:
    """Returns (outputs, inputs, share of dense bytes touched) of a cell's linears."""
    size = model.dtype.itemsize
    found = []
    for entry in linears:
        outputs, inputs = entry["shape"]
        own = LinearBytes(entry["name"], outputs, inputs, size, entry["rank"], entry["density"], entry["scaled"])
        found.append((outputs, inputs, own.touched_bytes / own.dense_bytes))
    return found
