"""Speed of the sparse product by itself: our kernel by sparsity, torch's dense linear, and a measured stream read.

    python -m sparsify.evals.kernel_speed --inputs 4096 --outputs 14336 --dtype bfloat16 --save kernel.json

Weights come from memory (`cold_calls`), sides take turns, inputs are normal random numbers, one token. Nothing is timed
before it equals the reference backend. torch's linear is bimodal from process to process: of several processes, the one
in which it was fastest is the result, and all of them are in the file. Not covered: several tokens (`crossover`), MLPs.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.evals.cold_calls import Call, Cold, Copies, cold_turns, torch_calls
from sparsify.evals.interleaving import Spread, medians, ratio
from sparsify.evals.machine import environment
from sparsify.evals.stream import Stream, require_native
from sparsify.kernels import native, reference
from sparsify.kernels.reference import keep_mask
from sparsify.kernels.spec import SparseTensors

SPARSITIES = (0.0, 0.5, 0.7, 0.9)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Of the output's norm: sums of thousands of products in another order, rounded once to the dtype.
_TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class KernelSide:
    """One side. bytes: weight bytes that one call touches; speedup: over our kernel at 0%, from the rounds' medians."""

    realised_sparsity: float
    ms: Spread
    bytes: float
    gb_per_second: float
    share_of_stream: Spread
    speedup: Spread


def kernel_speed(inputs: int, outputs: int, dtype: torch.dtype, *, rounds: int = 40) -> dict[str, Any]:
    """Measures a linear [outputs, inputs] in this process and returns the document of it.

    Raises UnavailableError without the native kernels, SparsifyError for sizes below 1 or a kernel that is wrong.
    """
    require_native()
    if min(inputs, outputs, rounds) < 1:
        raise SparsifyError(f"inputs, outputs and rounds must be at least 1, not {inputs}, {outputs} and {rounds}")
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=random).mul_(inputs**-0.5).to(dtype)
    copies, stream = Copies.of(weight), Stream(weight.device)
    x = [torch.randn(1, inputs, generator=random).to(dtype) for _ in copies.rows]
    sites = {s: [_site(x[i], w, s) for i, w in enumerate(copies.channels)] for s in SPARSITIES}
    kept = {_name(s): _kept(x, site) for s, site in sites.items()}
    calls = {_name(s): _checked(x, site, dtype) for s, site in sites.items()} | torch_calls(x, copies.rows)
    measured = cold_turns(calls, len(x), stream, rounds)
    sides = {name: _side(measured, name, kept.get(name, 1.0), weight.nbytes) for name in calls}
    return {
        "inputs": inputs,
        "outputs": outputs,
        "dtype": str(dtype).removeprefix("torch."),
        "copies": len(x),
        "rounds": rounds,
        "stream": {"buffer_bytes": stream.size, "gb_per_second": asdict(Spread.of(measured.stream))},
        "sides": {name: asdict(side) for name, side in sides.items()},
        "torch": min((name for name in sides if name.startswith("torch")), key=lambda name: sides[name].ms.median),
        "waited_for_cpu": measured.waited_for_cpu,
        **environment(weight.device),
    }


def in_processes(inputs: int, outputs: int, dtype: str, *, rounds: int, processes: int) -> dict[str, Any]:
    """Measures in several processes, one after the other; returns the one where torch was fastest, all of them in it.

    Raises SparsifyError for what a process said was wrong.
    """
    settings = {
        "inputs": inputs, "outputs": outputs, "dtype": dtype, "rounds": rounds,
        "threads": torch.get_num_threads(), "processes": 1,
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "sparsify.evals.kernel_speed", *flags, "--json"]
    found = []
    for _ in range(processes):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SparsifyError(done.stderr.strip().removeprefix("error: ") or f"exit code {done.returncode}")
        found.append(json.loads(done.stdout))
    best: dict[str, Any] = min(found, key=lambda document: float(document["sides"][document["torch"]]["ms"]["median"]))
    return best | {"processes": found}


def table(document: dict[str, Any]) -> str:
    """Returns the result as markdown."""
    gb = document["stream"]["gb_per_second"]["median"]
    lines = [
        f"{document['outputs']}×{document['inputs']} {document['dtype']}, {document['cpu']}, "
        f"{document['threads']} threads, {document['isa']}, a stream read moves {gb:.1f} GB/s",
        "",
        "| | realised | ms | p10 to p90 | × our 0% | GB/s | of stream |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, side in document["sides"].items():
        ms, speedup = side["ms"], side["speedup"]
        lines.append(
            f"| {name}{' (its faster mode)' if name == document['torch'] else ''} | {side['realised_sparsity']:.1%} | "
            f"{ms['median']:.2f} | {ms['p10']:.2f} to {ms['p90']:.2f} | {speedup['median']:.2f} | "
            f"{side['gb_per_second']:.1f} | {side['share_of_stream']['median']:.0%} |"
        )
    if document["waited_for_cpu"] is not None:
        lines += [
            "",
            f"In a second of the measurement its threads waited {document['waited_for_cpu']:.2f} s for a CPU.",
        ]
    return "\n".join(lines)


def _name(sparsity: float) -> str:
    return f"ours {sparsity:.0%}"


def _site(x: Tensor, weight: Tensor, sparsity: float) -> tuple[SparseTensors]:
    magnitudes = x.float().abs().flatten()
    threshold = magnitudes.quantile(sparsity) if sparsity else torch.tensor(-1.0)
    return (SparseTensors(weight, None, threshold),)


def _kept(x: list[Tensor], sites: list[tuple[SparseTensors]]) -> float:
    shares = [keep_mask(x[index], site[0].threshold).float().mean() for index, site in enumerate(sites)]
    return float(torch.stack(shares).mean())


def _checked(x: list[Tensor], sites: list[tuple[SparseTensors]], dtype: torch.dtype) -> Call:
    """Returns the call of our kernel after comparing its first result with the reference's in fp32.

    It is the library's call with its arguments made before, as in the decode step; `native.run` makes and checks them
    at every call, some 20 to 100 microseconds of Python with cold caches.
    """
    site = sites[0][0]
    wide = SparseTensors(site.weight.float(), None, site.threshold)
    expected, found = reference.sparse_linear(x[0].float(), wide), native.run(x[0], sites[0])[0].float()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error <= _TOLERANCES[dtype]:
        raise SparsifyError(
            f"the native kernel is wrong by {error:.1e} here, so it is not timed: see `sparsify doctor`"
        )
    linears = [[native.checked(dtype, x[0].shape[1], tensors) for tensors in site] for site in sites]
    outputs = [[torch.empty(1, site.weight.shape[0], dtype=dtype)] for _ in sites]
    return lambda index: native.few_tokens(x[index], linears[index], outputs[index])


def _side(measured: Cold, name: str, kept: float, dense_bytes: int) -> KernelSide:
    rounds = measured.seconds[name]
    ms = Spread.of([1e3 * seconds for call in rounds for seconds in call])
    touched = kept * dense_bytes
    shares = [touched / s / 1e9 / gb for s, gb in zip(medians(rounds), measured.stream, strict=True)]
    return KernelSide(
        realised_sparsity=1.0 - kept,
        ms=ms,
        bytes=touched,
        gb_per_second=touched / ms.median / 1e6,
        share_of_stream=Spread.of(shares),
        speedup=ratio(measured.seconds[_name(0.0)], rounds),
    )


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    if args.threads is not None:
        if args.threads < 1:
            raise SparsifyError(f"--threads must be at least 1, not {args.threads}")
        torch.set_num_threads(args.threads)
    if args.processes > 1:
        return in_processes(args.inputs, args.outputs, args.dtype, rounds=args.rounds, processes=args.processes)
    return kernel_speed(args.inputs, args.outputs, DTYPES[args.dtype], rounds=args.rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.kernel_speed", description=__doc__)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=14336)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, help="as torch has it where left out")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--processes", type=int, default=3, help="measured one after the other")
    parser.add_argument("--json", action="store_true", help="print one JSON document and no table")
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write the JSON to this file")
    args = parser.parse_args(arguments)
    try:
        document = _measured(args)
    except SparsifyError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    sys.stdout.write(text if args.json else table(document) + "\n")
    if args.save is not None:
        args.save.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
