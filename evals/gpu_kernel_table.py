"""The document of `sparsify.evals.gpu_kernel_speed` as markdown: a table of sites, the MLP, TEAL, and low rank.

A side or a measurement with a problem says it in the place of its numbers. Not covered: plots.
"""

from collections.abc import Sequence
from typing import Any

_HEAD = ("form", "sparsity", "kept", "ms", "p10 to p90", "GB/s", "of a copy")
_COLUMNS = {"speedup": "× our 0%", "over_dense": "× dense", "over_teal": "× TEAL"}


def table(document: dict[str, Any]) -> str:
    """Returns the document as markdown."""
    gpu = document["device"]
    lines = [f"{gpu}, {document['dtype']}, tiles: {document['tiles']}, inputs: {document['inputs']}", ""]
    parts = {"site": "sites", "MLP": "mlp", "against TEAL": "teal"}
    for title, entries in ((title, document[part]) for title, part in parts.items() if document[part]):
        ratios = [label for label in _COLUMNS if any(label in side for e in entries for side in e.get("sides", []))]
        columns = [title, *_HEAD, *(_COLUMNS[label] for label in ratios)]
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += [line for entry in entries for line in _lines(entry, ratios)]
        lines.append("")
    if document["low_rank"]:
        lines += [
            "| site | sparsity | rank | ms | the same bytes in channels, ms | extra |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_low_rank_line(entry) for entry in document["low_rank"]]
    if document["left"]:
        lines += ["", f"The time ended with {document['left']} measurements left."]
    return "\n".join(lines).rstrip()


def _lines(entry: dict[str, Any], ratios: Sequence[str]) -> list[str]:
    if "problem" in entry:
        return [f"| {entry['problem']} |" + " |" * (len(_HEAD) + len(ratios))]
    found = []
    for side in entry["sides"]:
        start = f"| {_name(entry)} | {side['form']} | {side['sparsity']:.0%} | {side['kept']:.1%} | "
        if "problem" in side:
            found.append(f"{start}{side['problem']} |" + " |" * (3 + len(ratios)))
            continue
        ms, shares = side["ms"], side["share_of_copy"]
        cells = [
            f"{ms['median']:.4f}", f"{ms['p10']:.4f} to {ms['p90']:.4f}", f"{side['gb_per_second']:.0f}",
            f"{shares['median']:.0%}", *("" if side[r] is None else f"{side[r]['median']:.2f}" for r in ratios),
        ]  # fmt: skip
        found.append(start + " | ".join(cells) + " |")
    return found


def _low_rank_line(entry: dict[str, Any]) -> str:
    start = f"| {_name(entry)} | {entry['sparsity']:.0%} | {entry['rank']} | "
    if "problem" in entry:
        return f"{start}{entry['problem']} | | |"
    low, channels = entry["low_rank_ms"]["median"], entry["channels_ms"]["median"]
    return f"{start}{low:.4f} | {channels:.4f} | {entry['ratio']['median'] - 1:+.1%} |"


def _name(entry: dict[str, Any]) -> str:
    return f"{entry['model']} {entry.get('name', 'MLP')}, {entry['tokens']} tok."
