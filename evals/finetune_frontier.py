"""The frontier of finetunings: λ against sparsity and perplexity, with the sparsity law, from what `finetune` saved.

    python -m sparsify.evals.finetune_frontier --dense dense.json --relu relu.json --prosparse l*.json --out prosparse

writes prosparse.json, prosparse.png and, on stdout, the tables of the results page. All must be of the same model,
tokens and evaluation text, which is checked. --shifts adds what `sparsify.evals.ffn_sparsity` measured of the same
checkpoints on the same windows at other shifts. Not covered: running them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError
from sparsify.evals.sparsity_law import SparsityLaw, fit_law
from sparsify.strict import read_json

# Perplexities over that many times the dense one's are left out of the picture.
_HIGHEST = 1.15
_COLOURS = {"line": "#1b7f79", "natural": "#9a9fa6", "relu": "#c0392b", "law": "#1b7f79"}


def frontier_of(
    dense: dict[str, Any], others: list[dict[str, Any]], more: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Returns a point for each run, by rising λ: its sparsity and its perplexity, without and with the shift, and at
    all shifts, with those of `more` for the checkpoint of the run.

    Raises SparsifyError for runs of another model, number of tokens or text.
    """
    points = []
    for run in others:
        for key in ("model", "tokens"):
            if run[key] != dense[key]:
                raise SparsifyError(f"{key} is {run[key]!r} in one run and {dense[key]!r} in the dense one")
        for key in ("text_sha256", "windows", "seq_len"):
            if run["measured"]["before"][key] != dense["measured"]["before"][key]:
                raise SparsifyError(f"the evaluation's {key} is another one in {run['out']} than in the dense run")
        natural, shifted = run["measured"]["shifts"][0], run["measured"]["shifts"][-1]
        baseline = dense["measured"]["after"]["perplexity"]
        found = [*run["measured"]["shifts"], *(one for one in more if Path(one["model"]).name == Path(run["out"]).name)]
        points.append(
            {
                "method": run["method"],
                "lambda": run["stages"]["factors"][-1],
                "natural_sparsity": natural["mean"],
                "natural_perplexity": natural["perplexity"],
                "shift": shifted["shift"],
                "sparsity": shifted["mean"],
                "perplexity": shifted["perplexity"],
                "over_dense": shifted["perplexity"] / baseline - 1.0,
                "zeros": shifted["zeros"],
                "shifts": [
                    {"shift": one["shift"], "sparsity": one["mean"], "perplexity": one["perplexity"]}
                    for one in sorted(
                        {one["shift"]: one for one in found}.values(), key=lambda one: float(one["shift"])
                    )
                ],
                "shift_search": run["measured"].get("shift_search", []),
            }
        )
    return sorted(points, key=lambda point: float(point["lambda"]))


def table(points: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Returns the frontier as a Markdown table; perplexities over the dense model of the same tokens."""
    after, before = (dense["measured"][key]["perplexity"] for key in ("after", "before"))
    rows = [
        "| | λ | zeros, no shift | perplexity, no shift | t | zeros | perplexity | over dense |",
        "|---|---|---|---|---|---|---|---|",
        f"| untouched | – | – | {before:.3f} | – | – | {before:.3f} | {before / after - 1.0:+.1%} |",
        f"| dense, same tokens | – | – | {after:.3f} | – | – | {after:.3f} | 0 |",
    ]
    for point in points:
        name = "vanilla ReLU" if point["method"] == "relu" else "ProSparse"
        rows.append(
            f"| {name} | {point['lambda']:g} | {point['natural_sparsity']:.1%} | {point['natural_perplexity']:.3f} | "
            f"{point['shift']:g} | {point['sparsity']:.1%} | {point['perplexity']:.3f} | {point['over_dense']:+.1%} |"
        )
    return "\n".join(rows) + "\n"


def shift_table(points: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Returns zeros and perplexity of each run at each shift, in brackets the latter over the dense model's."""
    after = dense["measured"]["after"]["perplexity"]
    shifts = sorted({one["shift"] for point in points for one in point["shifts"]})
    rows = ["| λ | " + " | ".join(f"t {shift:g}" for shift in shifts) + " |", "|---" * (len(shifts) + 1) + "|"]
    for point in points:
        known = {one["shift"]: one for one in point["shifts"]}
        cells = [
            f"{one['sparsity']:.1%}, {one['perplexity']:.3f} ({one['perplexity'] / after - 1.0:+.1%})" if one else "–"
            for one in (known.get(shift) for shift in shifts)
        ]
        rows.append(f"| {point['lambda']:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def save_frontier_plot(points: list[dict[str, Any]], law: SparsityLaw | None, dense: float, path: Path) -> None:
    """Draws sparsity over λ with the law, and perplexity over sparsity with the dense model and 5% above it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    factors = [point["lambda"] for point in points]
    for key, name in (("natural_sparsity", "natural"), ("sparsity", "line")):
        label = "no shift" if name == "natural" else "with the shift"
        left.plot(factors, [100 * point[key] for point in points], "o", color=_COLOURS[name], label=label, markersize=5)
    if law is not None:
        grid = [max(factors) * i / 200 for i in range(201)]
        text = f"100 − exp(−{law.a:.3g}·λ^{law.b:.2f} + {law.c:.3g})"
        left.plot(grid, [law.at(x) for x in grid], color=_COLOURS["natural"], linewidth=1, label=text)
    left.set_xlabel("λ of the last stage")
    left.set_ylabel("zeros that enter down, %")
    left.legend(frameon=False, fontsize=8)
    # From pale to dark; the runs lie too close to be named in their places.
    for number, point in enumerate(points):
        kept = [one for one in point["shifts"] if one["perplexity"] <= _HIGHEST * dense]
        x, y = [100 * one["sparsity"] for one in kept], [one["perplexity"] for one in kept]
        name = "ReLU" if point["method"] == "relu" else f"λ {point['lambda']:g}"
        shade = 0.3 + 0.7 * number / max(1, len(points) - 1)
        right.plot(x, y, marker="o", markersize=4, color=_COLOURS["line"], alpha=shade, linewidth=1, label=name)
    right.axhline(dense, color=_COLOURS["relu"], linewidth=1, label="dense, same tokens")
    right.axhline(1.05 * dense, color=_COLOURS["relu"], linewidth=1, linestyle="--", label="5% above")
    right.set_xlabel("zeros that enter down, %")
    right.set_ylabel("perplexity")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="the --save file of --method dense")
    parser.add_argument("--relu", type=Path, required=True, help="the --save file of --method relu")
    parser.add_argument("--prosparse", type=Path, nargs="+", required=True, help="those of --method prosparse")
    parser.add_argument("--shifts", type=Path, nargs="*", default=[], help="lines of JSON of evals.ffn_sparsity")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without a suffix")
    args = parser.parse_args()
    dense = read_json(args.dense)
    more = [json.loads(line) for path in args.shifts for line in path.read_text(encoding="utf-8").splitlines()]
    points = frontier_of(dense, [read_json(path) for path in (args.relu, *args.prosparse)], more)
    law = None
    if len(points) >= 4:
        law = fit_law([p["lambda"] for p in points], [100 * p["natural_sparsity"] for p in points])
    result = {
        "model": dense["model"],
        "tokens": dense["tokens"],
        "settings": {key: value for key, value in dense["settings"].items() if key not in ("out", "state")},
        "untouched": dense["measured"]["before"],
        "dense": dense["measured"]["after"],
        "points": points,
        "law": None if law is None else {"a": law.a, "b": law.b, "c": law.c, "rms_points": law.error},
    }
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    save_frontier_plot(points, law, dense["measured"]["after"]["perplexity"], args.out.with_suffix(".png"))
    print(table(points, dense))
    print(shift_table(points, dense))
    if law is not None:
        print(f"S = 100 − exp(−{law.a:.3g}·λ^{law.b:.2f} + {law.c:.3g}), rms {law.error:.2f} points, without the shift")


if __name__ == "__main__":
    main()
