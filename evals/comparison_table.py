"""The cells of `sparsify.evals.compare` as markdown: one section a model, text and protocol.

rise is ln(perplexity) − ln(dense perplexity) on the same tokens; × TEAL divides it by TEAL's at the same sparsity, so
below 1 is better than TEAL. Not covered: plots.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

Cell = dict[str, Any]

_BASELINE = "teal"
_OWN = ("method", "sparsity")


def render(cells: list[Cell]) -> str:
    """Returns the whole document, sections in the order in which their first cells were measured."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        shared = {name: value for name, value in cell["key"].items() if name not in _OWN}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(cell)
    return "\n\n".join(_section(group) for group in groups.values()) + "\n"


def log_rise(cell: Cell, cells: list[Cell]) -> float | None:
    """Returns the rise in log-perplexity over the dense cell of the same group, None where one of them is missing."""
    dense = [c for c in cells if c["key"]["method"] == "dense" and "result" in c]
    if not dense or "result" not in cell:
        return None
    return float(_quality(cell)["nll_per_token"] - _quality(dense[0])["nll_per_token"])


def ratio_to_teal(cell: Cell, cells: list[Cell]) -> float | None:
    """Returns the cell's rise over TEAL's at the same sparsity, None where one is missing or TEAL's is not > 0."""
    sparsity = cell["key"]["sparsity"]
    teal = [c for c in cells if c["key"]["method"] == _BASELINE and c["key"]["sparsity"] == sparsity]
    rise = log_rise(cell, cells)
    reference = log_rise(teal[0], cells) if teal else None
    return rise / reference if rise is not None and reference is not None and reference > 0 else None


def _section(cells: list[Cell]) -> str:
    return "\n".join([*_head(cells), "", *_summary(cells), "", *_details(cells), *_spectrum(cells)])


def _head(cells: list[Cell]) -> Iterator[str]:
    key = cells[0]["key"]
    calibration = key["calibration"]
    rotated = ", rotated" if key.get("rotated") else ""
    yield f"## {key['model']}{rotated}, {key['protocol']}"
    yield ""
    for cell in cells:
        if cell["key"]["method"] == "dense":
            quality = _quality(cell)
            bos = "BOS first" if key["bos"] else "no BOS"
            yield (
                f"Dense: perplexity {quality['perplexity']:.4f}, {quality['bits_per_byte']:.4f} bits per byte, on "
                f"{quality['tokens']:,} tokens ({quality['bytes']:,} bytes) of {key['text']} in {key['windows']} "
                f"windows of {key['seq_len']} tokens, {bos}, stride {key['stride']}. "
                f"Scored: {quality['scored']}. Dtype {quality['dtype']}."
            )
    yield (
        f"Calibrated on {calibration['sequences']} windows of {calibration['seq_len']} tokens of "
        f"{calibration['source']}. Weights SHA-256 {key['model_sha256'][:12]}, evaluation text "
        f"{key['text_sha256'][:12]}, sparsify {key['sparsify_version']}."
    )


def _summary(cells: list[Cell]) -> Iterator[str]:
    sparsities = sorted({c["key"]["sparsity"] for c in cells if c["key"]["method"] != "dense"})
    yield "Perplexity, in brackets the rise in log-perplexity relative to TEAL's:"
    yield ""
    yield "| method | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |"
    yield "|---" * (len(sparsities) + 1) + "|"
    for method in _methods(cells):
        by_sparsity = {c["key"]["sparsity"]: c for c in cells if c["key"]["method"] == method}
        texts = [_brief(by_sparsity.get(s), cells) for s in sparsities]
        yield f"| {method} | " + " | ".join(texts) + " |"


def _brief(cell: Cell | None, cells: list[Cell]) -> str:
    if cell is None:
        return "–"
    if "result" not in cell:
        return "refused"
    return f"{_perplexity(cell)} ({_number(ratio_to_teal(cell, cells), 2)})"


def _details(cells: list[Cell]) -> Iterator[str]:
    yield "| method | nominal | weighted | realised | perplexity | bits/byte | rise | × TEAL | mean rho | with a rank |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for method in _methods(cells):
        for cell in sorted(
            (c for c in cells if c["key"]["method"] == method), key=lambda c: float(c["key"]["sparsity"])
        ):
            yield _row(cell, cells)


def _row(cell: Cell, cells: list[Cell]) -> str:
    key = cell["key"]
    if "result" not in cell:
        return f"| {key['method']} | {key['sparsity']:.0%} | refused: {cell['refused']} | | | | | | | |"
    result = cell["result"]
    linears = result["linears"]
    shares = [f"{result[f'{kind}_sparsity']:.1%}" for kind in ("nominal", "weighted", "realised")]
    ranked = sum(linear["rank"] > 0 for linear in linears)
    rho = sum(linear["rho"] for linear in linears) / len(linears)
    numbers = [
        _perplexity(cell),
        f"{_quality(cell)['bits_per_byte']:.4f}",
        _number(log_rise(cell, cells), 4),
        _number(ratio_to_teal(cell, cells), 3),
        f"{rho:.3f}",
        f"{ranked} of {len(linears)}",
    ]
    return "| " + " | ".join([key["method"], *shares, *numbers]) + " |"


def _spectrum(cells: list[Cell]) -> Iterator[str]:
    """Yields singular-value decay by kind of linear, where a cell's method looked at it."""
    spectra = [
        [e for e in c["result"]["linears"] if e["energy_ranks"]] for c in cells if c.get("result", {}).get("linears")
    ]
    widest = max(spectra, key=len, default=[])
    if not widest:
        return
    yield from (
        "",
        "Singular values: the share of all ranks that holds 50, 90 and 99% of ‖W‖², mean over blocks. Flat spectra",
        "need nearly every rank, and a low-rank product then buys little for its bytes.",
        "",
        "| linear | shape | 50% | 90% | 99% |",
        "|---|---|---|---|---|",
    )
    kinds: dict[tuple[str, tuple[int, int]], list[list[int]]] = {}
    for entry in widest:
        kind = (str(entry["name"]).rsplit(".", 1)[-1], (entry["shape"][0], entry["shape"][1]))
        kinds.setdefault(kind, []).append(entry["energy_ranks"])
    for (name, shape), ranks in kinds.items():
        shares = [sum(r[i] for r in ranks) / len(ranks) / min(shape) for i in range(3)]
        yield f"| {name} | {shape[0]}×{shape[1]} | " + " | ".join(f"{share:.0%}" for share in shares) + " |"


def _methods(cells: list[Cell]) -> list[str]:
    return list(dict.fromkeys(c["key"]["method"] for c in cells if c["key"]["method"] != "dense"))


def _quality(cell: Cell) -> dict[str, Any]:
    quality: dict[str, Any] = cell["result"]["quality"]
    return quality


def _perplexity(cell: Cell) -> str:
    value = float(_quality(cell)["perplexity"])
    return f"{value:.3f}" if value < 1e4 else f"{value:.2e}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"
