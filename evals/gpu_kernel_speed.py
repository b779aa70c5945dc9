"""Speed of the Triton kernels by themselves: every input site of real models, by sparsity, form and number of tokens.

    python -m sparsify.evals.gpu_kernel_speed --model llama-3-8b --dtype bfloat16 --save FILE

For every site: our masked and indexed product and torch's linear over the site's merged row-major weights, beside a
copy within the device's memory (`gpu_timing` says how it is timed). Then R-Sparse against the same bytes in channels,
the gated MLP as a whole, and TEAL's own kernel where a checkout of it is at hand. Inputs are normal random numbers,
thresholds quantiles of them, unless recorded activations are given. A kernel that is wrong is not timed.
Not covered: whole steps, attention, where lists come from the norm before.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.errors import SparsifyError, suggest
from sparsify.evals.gpu_bench import ROUNDS, SPARSITIES, Bench, described, milliseconds, site_call
from sparsify.evals.gpu_kernel_table import table
from sparsify.evals.gpu_timing import (
    ACTIVATION,
    DTYPES,
    TOLERANCES,
    Call,
    Side,
    Site,
    SiteCopies,
    copies_on,
    exact,
    gated,
    line_of,
    require_gpu,
)
from sparsify.evals.interleaving import ratio
from sparsify.evals.machine import environment
from sparsify.evals.teal_kernel import Teal, load_teal, teal_speed
from sparsify.kernels.gpu.tiles import MOST_TOKENS
from sparsify.kernels.spec import SparseTensors

RANK, _RANK_SPARSITIES = 64, (0.5, 0.7)
# In the MLP a value whose rounding falls to its other side can fall to the other side of down's threshold, too.
_MLP_TOLERANCE = 5.0

# What a side is faster than, by the name of the ratio.
_OVER_OURS = {"speedup": "masked 0%", "over_dense": "dense"}


@dataclass(frozen=True)
class Block:
    """The sizes of one block of a model of the Llama kind."""

    hidden: int
    queries: int
    keys: int
    neurons: int

    def sites(self) -> list[Site]:
        """Returns its input sites."""
        return [
            Site("qkv", self.hidden, (self.queries, self.keys, self.keys)),
            Site("o", self.queries, (self.hidden,)),
            Site("gate_up", self.hidden, (self.neurons, self.neurons)),
            Site("down", self.neurons, (self.hidden,), gated=True),
        ]


MODELS = {
    # https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json
    "llama-2-7b": Block(hidden=4096, queries=4096, keys=4096, neurons=11008),
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
    "llama-3-8b": Block(hidden=4096, queries=4096, keys=1024, neurons=14336),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "llama-3.2-1b": Block(hidden=2048, queries=2048, keys=512, neurons=8192),
}


def kernel_speed(
    bench: Bench,
    models: Sequence[str],
    dtype: torch.dtype,
    *,
    tokens: Sequence[int] = (1,),
    recorded: Mapping[str, Tensor] | None = None,
    teal: Teal | None = None,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    partial: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measures the models and returns the document; partial takes what there is of it after every measurement.

    recorded: inputs by the name of a site, as `SiteCopies` takes them. seconds: after them nothing more is begun, and
    `left` counts what was not. Raises SparsifyError for an unknown model or a number of tokens that is none of 1 to 8,
    UnavailableError where memory is short.
    """
    _check(models, tokens)
    until = clock() + seconds
    jobs = list(_jobs(bench, models, dtype, tokens, recorded or {}, teal))
    document: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": bench.rounds,
        "tiles": bench.table.device,
        "inputs": "recorded" if recorded else "normal random numbers",
        "copy_bytes": bench.copy.size,
        "left": len(jobs),
        "sites": [], "mlp": [], "teal": [], "low_rank": [],
        **environment(bench.device),
    }  # fmt: skip
    for part, about, measure in jobs:
        if clock() >= until:
            break
        found = measure()
        document[part] += [about | row for row in (found if isinstance(found, list) else [found])]
        document["left"] -= 1
        partial(document)
    return document


def _jobs(
    bench: Bench,
    models: Sequence[str],
    dtype: torch.dtype,
    tokens: Sequence[int],
    recorded: Mapping[str, Tensor],
    teal: Teal | None,
) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any] | list[dict[str, Any]]]]]:
    """What is measured, by part of the document: what matters most comes first, for every model."""
    blocks = [(name, number, MODELS[name]) for name in models for number in tokens]
    sites: list[tuple[dict[str, Any], Site, int]] = [
        ({"model": name, "tokens": number, **asdict(site)}, site, number)
        for name, number, block in blocks
        for site in block.sites()
    ]
    for about, site, number in sites:
        yield "sites", about, functools.partial(site_speed, bench, site, dtype, number, recorded.get(site.name))
    for name, number, block in blocks:
        about = {"model": name, "tokens": number}
        yield "mlp", about, functools.partial(mlp_speed, bench, block, dtype, number)
    for about, site, number in sites:
        if teal is not None and number == 1:
            yield "teal", about, functools.partial(teal_speed, bench, site, teal)
    for about, site, number in sites:
        yield "low_rank", about, functools.partial(low_rank_speed, bench, site, dtype, number)


def site_speed(
    bench: Bench, site: Site, dtype: torch.dtype, tokens: int, recorded: Tensor | None = None
) -> dict[str, Any]:
    """Measures one site: both forms at every sparsity, and torch's product of it (for a gated one without act · up)."""
    copies = bench.copies(site, dtype, tokens, recorded)
    sides: dict[str, Side] = {}
    about: dict[str, dict[str, Any]] = {}
    for sparsity in bench.sparsities:
        tensors = copies.tensors(sparsity)
        expected, kept = copies.expected(tensors[0]), copies.kept(tensors)
        for form in ("masked", "indexed"):
            name = f"{form} {sparsity:.0%}"
            call = site_call(bench, copies, tensors, indexed=form == "indexed")
            sides[name] = Side(call, expected, TOLERANCES[dtype])
            touched = kept * site.nbytes(dtype)
            about[name] = {"form": form, "sparsity": sparsity, "kept": kept, "bytes": touched}
    rows = copies.rows()
    sides["dense"] = Side(lambda index: F.linear(copies.h[index], rows[index]))
    about["dense"] = {"form": "torch", "sparsity": 0.0, "kept": 1.0, "bytes": site.nbytes(dtype)}
    measured = bench.timed(sides, len(copies))
    return {"copies": len(copies)} | described(measured, about, _OVER_OURS)


def low_rank_speed(bench: Bench, site: Site, dtype: torch.dtype, tokens: int) -> list[dict[str, Any]]:
    """Measures R-Sparse at rank 64 against a product that reads the same bytes in channels, both with a scale.

    ratio: seconds over the other's, so 1.08 is 8% of extra time.
    """
    copies = bench.copies(site, dtype, tokens)
    low_bytes = RANK * (site.inputs * len(site.outputs) + sum(site.outputs)) * dtype.itemsize
    found = []
    for sparsity in _RANK_SPARSITIES:
        same = sparsity - low_bytes / site.nbytes(dtype)
        if same <= 0:
            continue
        sides = {}
        for name, share, rank in (("low rank", sparsity, RANK), ("channels", same, 0)):
            tensors = copies.tensors(share, rank=rank, scaled=True)
            call = site_call(bench, copies, tensors, indexed=None)
            sides[name] = Side(call, copies.expected(tensors[0]), TOLERANCES[dtype])
        measured = bench.timed(sides, len(copies))
        row: dict[str, Any] = {"rank": RANK, "sparsity": sparsity, "low_rank_bytes": low_bytes}
        if measured.problems:
            found.append(row | {"problem": _joined(measured.problems)})
            continue
        times = {f"{name.replace(' ', '_')}_ms": asdict(milliseconds(measured.seconds[name])) for name in sides}
        extra = ratio(measured.seconds["low rank"], measured.seconds["channels"])
        found.append(row | times | {"ratio": asdict(extra)})
    return found


def mlp_speed(bench: Bench, block: Block, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Measures the gated MLP as a whole: ours in the form of the table, and dense as product, act · up, product."""
    from sparsify.kernels.gpu.mlp import gated_mlp
    from sparsify.kernels.gpu.site import run_site

    pair_site, down_site = block.sites()[2], replace(block.sites()[3], gated=False)
    size = pair_site.nbytes(dtype) + down_site.nbytes(dtype)
    number = copies_on(bench.device, size, 1.0 - max(bench.sparsities), cache=bench.cache)
    pair = SiteCopies(pair_site, dtype, tokens, bench.device, number)
    down = SiteCopies(down_site, dtype, tokens, bench.device, number, seed=1)
    sides: dict[str, Side] = {}
    about: dict[str, dict[str, Any]] = {}
    for sparsity in bench.sparsities:
        sites = pair.tensors(sparsity)
        # What down meets at this sparsity: its thresholds are quantiles of it.
        down.h = [
            gated(*run_site(x, site, scratch=bench.scratch, table=bench.table))
            for x, site in zip(pair.x, sites, strict=True)
        ]
        lasts = down.tensors(sparsity)
        call = _mlp_call(gated_mlp, pair.x, sites, lasts)
        name = f"ours {sparsity:.0%}"
        sides[name] = Side(call, [_exact_mlp(pair.x[0], sites[0], lasts[0][0])], _MLP_TOLERANCE * TOLERANCES[dtype])
        touched = pair.kept(sites) * pair_site.nbytes(dtype) + down.kept(lasts) * down_site.nbytes(dtype)
        about[name] = {"form": "ours", "sparsity": sparsity, "kept": touched / size, "bytes": touched}
    pair_rows, down_rows = pair.rows(), down.rows()

    def dense(index: int) -> Tensor:
        g, u = torch.split(F.linear(pair.x[index], pair_rows[index]), block.neurons, dim=-1)
        return F.linear(gated(g, u), down_rows[index])

    sides["dense"] = Side(dense)
    about["dense"] = {"form": "torch", "sparsity": 0.0, "kept": 1.0, "bytes": size}
    measured = bench.timed(sides, number)
    return {"copies": number} | described(measured, about, {"speedup": "ours 0%", "over_dense": "dense"})


def _joined(problems: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {problem}" for name, problem in problems.items())


def _mlp_call(
    gated_mlp: Callable[..., Tensor],
    x: Sequence[Tensor],
    sites: Sequence[Sequence[SparseTensors]],
    lasts: Sequence[Sequence[SparseTensors]],
) -> Call:
    return lambda index: gated_mlp(x[index], *sites[index], lasts[index][0], activation=ACTIVATION)


def _exact_mlp(x: Tensor, pair: Sequence[SparseTensors], down: SparseTensors) -> Tensor:
    """The gated MLP in fp64, rounded between its products as the modules round."""
    gate, up = (exact(x, t).to(x.dtype) for t in pair)
    return exact(F.silu(gate) * up, down)


def _check(models: Sequence[str], tokens: Sequence[int]) -> None:
    for name in models:
        if name not in MODELS:
            raise SparsifyError(f"unknown model {name!r}: known are {', '.join(MODELS)}.{suggest(name, MODELS)}")
    if not tokens or not all(1 <= number <= MOST_TOKENS for number in tokens):
        raise SparsifyError(f"the numbers of tokens are {list(tokens)}, they must be from 1 to {MOST_TOKENS}")


def _recorded(file: Path | None, device: torch.device) -> dict[str, Tensor] | None:
    from safetensors.torch import load_file

    if file is None:
        return None
    names = {site.name for site in MODELS["llama-3-8b"].sites()}
    found = load_file(file, device=str(device))
    if not found or set(found) - names:
        raise SparsifyError(f"{file} holds {', '.join(found) or 'nothing'}; it may hold {', '.join(sorted(names))}")
    return found


def _bench(args: argparse.Namespace) -> Bench:
    device = torch.device(args.device)
    require_gpu(device)
    torch.cuda.set_device(device)
    device = torch.device("cuda", torch.cuda.current_device())
    return Bench.on(device, rounds=args.rounds, sparsities=args.sparsity)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    if not all(0 <= share < 1 for share in args.sparsity) or args.rounds < 1:
        raise SparsifyError(f"--sparsity is in [0, 1) and --rounds at least 1, not {args.sparsity} and {args.rounds}")
    bench = _bench(args)
    teal, failed = None, None
    if args.teal is not None:
        try:
            teal = load_teal(args.teal)
        except SparsifyError:
            raise
        # The code of others: whatever it raises, our own measurement goes on.
        except Exception as raised:  # noqa: BLE001
            failed = {"problem": f"TEAL cannot be imported: {line_of(raised)}"}
            sys.stderr.write(f"{failed['problem']}\n")

    def partial(document: dict[str, Any]) -> None:
        if args.save is not None:
            args.save.write_text(_json(document), encoding="utf-8")
        sys.stderr.write(f"{document['left']} measurements left\n")

    recorded = _recorded(args.activations, bench.device)
    document = kernel_speed(
        bench, args.model, DTYPES[args.dtype], tokens=args.tokens, recorded=recorded, teal=teal, seconds=args.seconds,
        partial=partial,
    )  # fmt: skip
    return document if failed is None else document | {"teal": [failed]}


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.gpu_kernel_speed", description=__doc__)
    parser.add_argument("--model", nargs="+", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1], help="at once: 1 to 8, any number of them")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after them nothing more is begun")
    parser.add_argument("--teal", type=Path, metavar="FOLDER", help="a checkout of FasterDecoding/TEAL")
    parser.add_argument(
        "--activations", type=Path, metavar="FILE",
        help="safetensors with inputs of one model's sites: qkv, o, gate_up [n, K], down [n, 2, K] (gate and up)",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON document and no table")
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write the JSON to this file, as it grows")
    args = parser.parse_args(arguments)
    try:
        document = _measured(args)
    except SparsifyError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    text = _json(document)
    sys.stdout.write(text if args.json else table(document) + "\n")
    if args.save is not None:
        args.save.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
