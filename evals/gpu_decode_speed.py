"""Decode speed of one real shape on a GPU, by context and batch: our graphs sparse and dense, and what else there is.

    python -m sparsify.evals.gpu_decode_speed --shape llama-3-8b --seconds 120 --save llama-3-8b.json

Random weights of the real shape are made on the device, TEAL's thresholds are quantiles of its own recorded
activations, and realised sparsity is counted in the steps that are timed. The prompt runs dense for every side, every
later token sparse. Cells are measured in the order of their importance while there is time, and each is written down
when it is done; a side whose logits are wrong is not timed. Only speed means something here: the weights are noise.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import SparsifyError
from sparsify.evals.decoding import WARM_UP_STEPS
from sparsify.evals.machine import environment
from sparsify.evals.random_subject import Subject, random_subject
from sparsify.evals.shapes import random_tokens
from sparsify.evals.speed import decode_speed
from sparsify.runtime import set_prefill

SPARSITIES = (0.25, 0.4, 0.5, 0.6, 0.7, 0.9)
# (context, batch), the most telling first.
CELLS = (
    (128, 1), (1024, 1), (4096, 1), (128, 4), (128, 2), (128, 8),
    (1024, 4), (1024, 2), (1024, 8), (4096, 2), (4096, 4), (4096, 8),
)  # fmt: skip
# The context whose decode steps thresholds are fitted on.
_FITTED_CONTEXT = 128
_COUNTED_STEPS = 8
# Relative norm, in bf16 through 32 random blocks; masks fall differently where inputs were rounded differently. A
# kernel that reads a wrong row is at 1.
_MOST_DIFFERENCE = 0.5


def decode_cells(
    shape: str,
    *,
    seconds: float,
    sparsities: Sequence[float] = SPARSITIES,
    cells: Sequence[tuple[int, int]] = CELLS,
    new_tokens: int = 64,
    rounds: int = 4,
    compiled: bool = False,
    device: str = "cuda",
    partial: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measures the cells and returns the document; partial takes what there is of it after every cell.

    compiled: torch.compile of transformers' code is a side of the first cell. Raises SparsifyError for an unknown
    shape, UnavailableError where memory is short for one copy of the weights.
    """
    started = time.monotonic()
    steps = WARM_UP_STEPS + new_tokens
    subject = random_subject(
        shape, sparsities=sparsities, prompt_tokens=_FITTED_CONTEXT, length=_FITTED_CONTEXT + steps, device=device
    )
    rows = subject.dense()
    set_prefill(subject.model, "dense")
    document: dict[str, Any] = {
        "shape": shape,
        "random_weights": True,
        "protocol": "prompt dense, every later token sparse",
        "new_tokens": new_tokens,
        "rounds": rounds,
        **environment(subject.model.device),
        "cells": [],
        "not_run": [],
    }
    longest = 0.0
    for number, (context, batch) in enumerate(cells):
        about = {"context": context, "batch": batch}
        # The next one takes as long as the longest so far, or there is no time for it.
        if time.monotonic() - started + longest > seconds:
            document["not_run"].append(about | {"reason": "no time was left"})
            continue
        before = time.monotonic()
        try:
            found = _cell(subject, rows, context, batch, new_tokens, rounds, first=number == 0, compiled=compiled)
            document["cells"].append(about | found)
        # One cell can be too large for the memory, or find a fault: the others are measured all the same.
        except Exception as raised:  # noqa: BLE001
            line = next(iter(str(raised).strip().splitlines()), "")
            document["not_run"].append(about | {"reason": f"{type(raised).__name__}: {line}"})
        if number:
            longest = max(longest, time.monotonic() - before)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        partial(document)
    return document


def _cell(
    subject: Subject, rows: Any, context: int, batch: int, new_tokens: int, rounds: int, *, first: bool, compiled: bool
) -> dict[str, Any]:
    tokens = random_tokens(subject.model, batch, context + WARM_UP_STEPS + new_tokens, seed=1)
    speed = decode_speed(
        subject.model,
        tokens,
        prompt_tokens=context,
        rounds=rounds,
        rows=rows,
        compiled=compiled and first,
        thresholds=subject.thresholds,
        counted_tokens=_COUNTED_STEPS,
        # Launches from Python take most of its time whatever the context is: once is enough.
        without=() if first else ("transformers",),
        most_difference=_MOST_DIFFERENCE,
    )
    whole = speed.to_dict()
    kept = ("sides", "ratios", "best_dense", "left_out", "native_problem", "stream", "prefill", "backends", "dtype")
    return {name: whole[name] for name in kept}


def table(document: dict[str, Any]) -> str:
    """Returns the document as markdown: a row for each side of each cell."""
    lines = [
        f"{document['shape']}, random weights, {document['device']}, {document['protocol']}, {document['date']}",
        "",
        "| context | batch | side | realised | ms a step | p10 to p90 | × best dense | GB/s | of a copy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in document["cells"]:
        best = cell["best_dense"]
        for name, side in cell["sides"].items():
            step = side["ms_per_step"]
            ratio = "1" if name == best else f"{cell['ratios'][name][best]['median']:.2f}"
            lines.append(
                f"| {cell['context']} | {cell['batch']} | {name}{' (best dense)' if name == best else ''} | "
                f"{side['touched']['realised_sparsity']:.0%} | {step['median']:.3f} | {step['p10']:.3f} to "
                f"{step['p90']:.3f} | {ratio} | {side['gb_per_second']:.0f} | {side['share_of_stream']['median']:.0%} |"
            )
        for name, reason in cell["left_out"].items():
            lines.append(f"| {cell['context']} | {cell['batch']} | {name} | not timed: {reason} | | | | | |")
    lines += [
        f"\nNot run: context {cell['context']}, batch {cell['batch']}: {cell['reason']}."
        for cell in document["not_run"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.gpu_decode_speed", description=__doc__)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--seconds", type=float, default=120.0, help="no cell is begun that would end later")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--compiled", action="store_true", help="also torch.compile of transformers' code; takes minutes"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON to this file, as it grows")
    given = parser.parse_args(arguments)

    def partial(document: dict[str, Any]) -> None:
        if given.save is not None:
            given.save.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    try:
        document = decode_cells(
            given.shape, seconds=given.seconds, new_tokens=given.new_tokens, rounds=given.rounds,
            compiled=given.compiled, device=given.device, partial=partial,
        )  # fmt: skip
    except SparsifyError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    partial(document)
    print(table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
