"""What ReLU-fication without training costs and wins back on one model: `python -m sparsify.evals.relufication`.

Every activation by itself, then the reconstruction of the ReLU swap with one setting changed at a time. Measured is
perplexity on held-out text and, in the same forwards, the zeros that down reads. Won back is the share of the rise in
log-perplexity of the bare ReLU swap that is gone: 1 − ln(p/dense)/ln(swap/dense); it counts only at as many zeros as
the swap has. Each row is kept when it is done, and a stopped run goes on from there.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsify.calibration import Calibration, hooked
from sparsify.evals.machine import environment
from sparsify.evals.perplexity import perplexity
from sparsify.models import load_dense, load_tokenizer
from sparsify.reconstruction import Reconstruction, reconstruct
from sparsify.relufication import Relufication, check_relufiable, relufy
from sparsify.strict import read_json
from sparsify.text import Windows, default_evaluation_text, read_text, windows
from sparsify.whole_file import write_whole
from sparsify.zeros import NonZero

_RELU, _FAT, _DOUBLE = Relufication(), Relufication("fatrelu"), Relufication("drelu")
_SHIFTED, _NORMS = Relufication("shifted_relu", zeros=0.9), Relufication(after_norms=True)


@dataclass(frozen=True)
class Try:
    """One row: a swap, how its MLPs are fitted (None: not at all), and on how many calibration windows."""

    name: str
    swap: Relufication
    fit: Reconstruction | None
    sequences: int


def tries(epochs: int, sequences: int) -> tuple[Try, ...]:
    """Returns the rows: the bare swap and its fit first, then one setting of the fit changed at a time, the others."""
    fit = Reconstruction(epochs=epochs)

    def fitted(name: str, swap: Relufication = _RELU, windows: int = sequences, **changed: Any) -> Try:
        return Try(name, swap, replace(fit, **changed), windows)

    def bare(name: str, swap: Relufication) -> Try:
        return Try(name, swap, None, sequences)

    return (
        bare("relu", _RELU),
        fitted("relu, fitted"),
        fitted("inputs dense", inputs="dense"),
        fitted("weighting hessian", weighting="hessian"),
        fitted("1 pass", epochs=1),
        fitted("zeros 0.03", sparsity_weight=0.03),
        fitted("a quarter of the text", windows=max(sequences // 4, 1)),
        bare("fatrelu, CETT 0.2", _FAT),
        bare("shifted_relu, least error", Relufication("shifted_relu")),
        bare("shifted_relu, 90% zeros", _SHIFTED),
        bare("drelu", _DOUBLE),
        bare("relu2", Relufication("relu2")),
        bare("polyrelu", Relufication("polyrelu")),
        bare("polynorm", Relufication("polynorm")),
        bare("crrelu", Relufication("crrelu")),
        bare("relu after norms", _NORMS),
        fitted("fatrelu, CETT 0.2, fitted", _FAT),
        fitted("shifted_relu, 90% zeros, fitted", _SHIFTED),
        fitted("relu after norms, fitted", _NORMS),
        fitted("drelu, fitted", _DOUBLE),
        fitted("zeros 0.1", sparsity_weight=0.1),
        fitted("four times the passes", epochs=4 * epochs),
        fitted("twice the text", windows=2 * sequences),
    )


def run_try(dense: PreTrainedModel, one: Try, calibration: Calibration, held_out: Windows) -> dict[str, Any]:
    """Returns the row of one try; the dense model stays as it is."""
    model = copy.deepcopy(dense)
    started, worked = time.monotonic(), time.process_time()
    fitted = None
    if one.fit is None:
        relufy(model, one.swap, calibration)
    else:
        fitted = [asdict(mlp) for mlp in reconstruct(model, one.swap, one.fit, calibration)]
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - worked
    downs = [mlp.down for mlp in check_relufiable(dense, one.swap).mlps]
    counters = {name: NonZero(model.device) for name in downs}
    with hooked({n: model.get_submodule(n) for n in downs}, lambda name, x: counters[name].see(x)):
        found = perplexity(model, held_out)
    return {
        "name": one.name,
        "swap": asdict(one.swap),
        "fit": None if one.fit is None else asdict(one.fit),
        "sequences": one.sequences,
        "perplexity": found.perplexity,
        "zeros": {name: 1.0 - counter.share() for name, counter in counters.items()},
        "mean_zeros": 1.0 - sum(counter.share() for counter in counters.values()) / len(counters),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "mlps": fitted,
    }


def with_won_back(dense: float, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with `won_back`, None where there is no bare ReLU swap to compare with, or it lost nothing."""
    swap = next((row["perplexity"] for row in rows if row["name"] == "relu"), None)
    if swap is None or swap <= dense:
        return [row | {"won_back": None} for row in rows]
    lost = math.log(swap / dense)
    return [row | {"won_back": 1.0 - math.log(row["perplexity"] / dense) / lost} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is not in the file yet, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.relufication", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--calibration", default="stdlib:calibration")
    parser.add_argument("--limit", type=int, default=32, help="held-out windows")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=5, help="passes of a fit")
    parser.add_argument("--sequences", type=int, default=16, help="calibration windows")
    parser.add_argument("--only", nargs="*", help="names of rows; all where left out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    tokenizer, dense = load_tokenizer(args.model), load_dense(args.model)
    text, (evaluation, _) = read_text(args.calibration), default_evaluation_text(args.model)
    held_out = windows(evaluation, tokenizer, seq_len=args.seq_len, limit=args.limit)
    about = {
        "model": args.model, "epochs": args.epochs, "sequences": args.sequences, "calibration": args.calibration,
        "seq_len": args.seq_len, "windows": len(held_out.tokens),
        "text": held_out.name, "text_sha256": held_out.sha256, "dtype": str(dense.dtype).removeprefix("torch."),
    }  # fmt: skip
    kept = read_json(args.out) if args.out.is_file() else about | {"rows": []}
    if any(kept.get(key) != value for key, value in about.items()):
        parser.error(f"{args.out} holds another run: give another --out")
    if "dense" not in kept:
        kept["dense"] = perplexity(dense, held_out).perplexity
    for one in tries(args.epochs, args.sequences):
        if any(row["name"] == one.name for row in kept["rows"]) or (args.only and one.name not in args.only):
            continue
        calibration = Calibration.from_text(text, tokenizer, sequences=one.sequences, seq_len=args.seq_len)
        torch.manual_seed(0)
        rows = [*kept["rows"], run_try(dense, one, calibration, held_out)]
        kept |= {"rows": with_won_back(kept["dense"], rows)} | environment(dense.device)
        write_whole(args.out, json.dumps(kept, indent=1) + "\n")
        print(_line(kept["rows"][-1]), flush=True)  # noqa: T201
    return 0


def _line(row: dict[str, Any]) -> str:
    won = "-" if row["won_back"] is None else f"{row['won_back']:.1%}"
    return (
        f"{row['name']}: perplexity {row['perplexity']:.3f}, zeros {row['mean_zeros']:.1%}, won back {won}, "
        f"{row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of CPU"
    )


if __name__ == "__main__":
    raise SystemExit(main())
