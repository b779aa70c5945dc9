"""Where the time of a decoded token goes, on named shapes with random weights: `python -m sparsify.evals.step_profile`.

For each shape and side (dense, TEAL at 50%): the whole token inside `generate`; the model's forward alone; the native
call inside of it; the same native call with no channel kept, so that only the head, attention, norms and barriers are
left; transformers' code around the same kernels; and the weights' bytes at a measured stream's speed. What the
parts leave is the caller's loop, Python around the call, and what no weight explains.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from sparsify.conversion import convert
from sparsify.evals.decoding import Side, running
from sparsify.evals.machine import environment
from sparsify.evals.shapes import (
    SHAPES,
    random_calibration,
    random_model,
    random_tokens,
    set_thresholds,
    teal_thresholds,
)
from sparsify.evals.stream import Stream
from sparsify.ledger import ledger_of
from sparsify.methods.teal import Teal
from sparsify.native_decode import native_forward_of, transformers_path
from sparsify.runtime import sparse_layers

_PROMPT, _STEPS, _ROUNDS = 128, 16, 3


def profile(shape: str, sparsity: float = 0.5) -> dict[str, Any]:
    """Returns the parts in milliseconds, medians of interleaved rounds, of a dense and of a sparse token."""
    model = random_model(shape)
    length = _PROMPT + _STEPS
    thresholds = teal_thresholds(model, random_calibration(model, length=length), [sparsity], skip=_PROMPT)[sparsity]
    convert(model, Teal(sparsity), random_calibration(model, windows=1, length=16))
    none = dict.fromkeys(sparse_layers(model), float("inf"))
    sides = {
        "dense": Side("dense", "", model, "native"),
        "sparse": Side("sparse", "", model, "native", run_dense=False, thresholds=thresholds),
        "nothing kept": Side("nothing", "", model, "native", run_dense=False, thresholds=none),
    }
    stream = Stream(torch.device("cpu"))
    found: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    speeds: list[float] = []
    for _ in range(_ROUNDS):
        speeds += stream.gb_per_second()
        for name, side in sides.items():
            with running(side):
                for part, seconds in _parts(model).items():
                    found[name].setdefault(part, []).append(1e3 * seconds)
    ledger = ledger_of(model)
    set_thresholds(model, thresholds)
    rest, gbs = ledger.rest_bytes, statistics.median(speeds)
    limits = {"dense": ledger.dense_bytes + rest, "sparse": ledger.touched_bytes + rest, "nothing kept": rest}
    return {
        "shape": shape,
        "sparsity": sparsity,
        "stream_gb_per_second": gbs,
        "sides": {
            name: {part: statistics.median(values) for part, values in parts.items()}
            | {"weights at the stream's speed": limits[name] / gbs / 1e6}
            for name, parts in found.items()
        },
    }


def _parts(model: PreTrainedModel) -> dict[str, float]:
    """Returns median seconds of a token by what is around it."""
    prompt = random_tokens(model, 1, _PROMPT, seed=2)
    forward = native_forward_of(model)
    assert forward is not None
    cache, token = _prefilled(model, prompt), prompt[:, :1]

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)

    def call() -> None:
        assert forward is not None
        plan = forward._plan
        assert plan is not None
        plan.step(token, *forward._rotation(plan, _PROMPT), run_dense=not model.sparsity_switch.sparse)  # type: ignore[union-attr]

    parts = {"generate": _generate(model, prompt), "forward": _median(step)}
    parts["native call"] = _median(call)
    with transformers_path(model):
        cache = _prefilled(model, prompt)
        parts["transformers' code, same kernels"] = _median(step, 6)
    return parts


def _generate(model: Any, prompt: torch.Tensor) -> float:
    """Seconds of a token in generate: the difference of two lengths, which both have the prompt."""
    seconds = []
    for count in (2, 2 + _STEPS):
        started = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        seconds.append(time.perf_counter() - started)
    return (seconds[1] - seconds[0]) / _STEPS


def _prefilled(model: Any, prompt: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _median(run: Callable[[], None], count: int = _STEPS) -> float:
    run()
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def table(results: list[dict[str, Any]]) -> str:
    """Returns the profiles as a Markdown table, milliseconds."""
    parts = list(results[0]["sides"]["dense"])
    lines = ["| shape | token | " + " | ".join(parts) + " |", "|---|---|" + "---|" * len(parts)]
    for result in results:
        for name, values in result["sides"].items():
            cells = " | ".join(f"{values[part]:.2f}" for part in parts)
            lines.append(f"| {result['shape']} | {name} | {cells} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.step_profile", description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args(arguments)
    results = []
    for shape in options.shape:
        results.append(profile(shape, options.sparsity))
        print(f"{shape}: done", file=sys.stderr)
    print(table(results))
    if options.save is not None:
        options.save.write_text(
            json.dumps({"profiles": results} | environment(torch.device("cpu")), indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
