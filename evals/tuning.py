"""A table of tiles for one GPU: a search for every launch of the models asked for, and where lists beat masks.

    python -m sparsify.evals.tuning --model llama-3-8b --seconds 90 --out DIR      (as `sparsify tune`)

Every launch is searched (`tile_search`) with what is measured on the device (`tile_measure`). The time is shared over
the launches, those of one token first; what one does not use goes to the next. The table is written after every launch
and is valid at any moment; a launch that was finished is not searched again. Not covered: attention, norms.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import SparsifyError, suggest
from sparsify.evals.gpu_kernel_speed import MODELS
from sparsify.evals.gpu_timing import DTYPES, GraphTimer, Site
from sparsify.evals.interleaving import Progress
from sparsify.evals.machine import cache_of, environment
from sparsify.evals.tile_measure import SiteMeasure
from sparsify.evals.tile_search import (
    FINALISTS,
    FINE_ROUNDS,
    INDEXED_DENSITY,
    MASKED_DENSITY,
    Clock,
    Found,
    Launch,
    Limits,
    Measure,
    crossing,
    launches_of,
    search,
)
from sparsify.kernels.gpu.tiles import RULES, Table, Tile, file_name, read_table, table_document
from sparsify.whole_file import write_whole

# Of the time: one token, and the comparison of forms, which is about one token, come first.
_WEIGHT_OF_ONE_TOKEN, _WEIGHT = 4.0, 1.0

# KxN1+N2: linears [N1, K] and [N2, K] that share their input.
_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*(?:\+[1-9]\d*){0,2})")

# (density, seconds masked, seconds indexed) of sites together, by rising density, with a table's tiles.
Compare = Callable[[Sequence[Site], Table], list[tuple[float, float, float]]]


def sites_of(models: Sequence[str], shapes: Sequence[str]) -> list[Site]:
    """Returns the sites of named models and those written as "KxN1+N2", one to three outputs.

    Raises SparsifyError for an unknown name, another text, or nothing at all.
    """
    if not models and not shapes:
        raise SparsifyError(f"give --model NAME ({', '.join(MODELS)}) or --shape KxN, or several of them")
    for name in models:
        if name not in MODELS:
            near = suggest(name, MODELS)
            raise SparsifyError(f"unknown model {name!r}: known are {', '.join(MODELS)}; others by --shape.{near}")
    sites = [site for name in models for site in MODELS[name].sites()]
    for text in shapes:
        found = _SHAPE.fullmatch(text)
        if found is None:
            raise SparsifyError(f"--shape {text} is none: write KxN, KxN1+N2 or KxN1+N2+N3, such as 4096x14336+14336")
        sites.append(Site(text, int(found[1]), tuple(int(part) for part in found[2].split("+"))))
    return sites


@dataclass
class Tuning:
    """A table in the making, in one file. about: device, versions, date and protocol, as the file says them.

    Raises SparsifyError for a file that is there and is of another device, protocol or versions, or no table.
    """

    path: Path
    about: Mapping[str, Any]
    tiles: dict[str, Tile] = field(default_factory=dict)
    launches: dict[str, dict[str, Any]] = field(default_factory=dict)
    crossover: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        self.tiles = dict(read_table(self.path).tiles)
        data = json.loads(self.path.read_text(encoding="utf-8"))
        for name in ("device", "versions", "protocol"):
            if data.get(name) != self.about[name]:
                raise SparsifyError(
                    f"{self.path} was made with another {name} ({data.get(name)}, here {self.about[name]}), so it "
                    "cannot be continued: delete it, or choose another folder with --out"
                )
        self.launches, self.crossover = dict(data["launches"]), data["crossover"]

    @property
    def table(self) -> Table:
        below = RULES.indexed_below if self.crossover is None else float(self.crossover["indexed_below"])
        return Table(str(self.about["device"]), below, dict(self.tiles))

    def document(self) -> dict[str, Any]:
        """Returns what the file holds."""
        more = {**self.about, "launches": self.launches, "crossover": self.crossover}
        del more["device"]
        return table_document(self.table, more)

    def take(self, launch: Launch, found: Found) -> None:
        """Adds what was found and writes the file, under another name first: it is whole at any moment."""
        if found.tile is not None:
            self.tiles[launch.key] = found.tile
        self.launches[launch.key] = found.to_dict()
        self.write()

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.document(), indent=1, ensure_ascii=False) + "\n")


def tune(
    launches: Sequence[Launch],
    tuning: Tuning,
    measure: Measure,
    limits: Limits,
    *,
    seconds: float,
    compare: Compare | None = None,
    clock: Clock = time.monotonic,
    progress: Progress | None = None,
) -> None:
    """Searches every launch that is not finished, within the seconds together, and writes the file after each.

    compare: measures both forms for one token; it is called after the launches of one token. Launches for which no
    time is left keep the rule's tile.
    """
    pending = [launch for launch in launches if not tuning.launches.get(launch.key, {}).get("complete")]
    single = [launch for launch in launches if launch.tokens == 1]
    jobs: list[Launch | None] = [launch for launch in pending if launch.tokens == 1]
    if compare is not None and single and tuning.crossover is None:
        jobs.append(None)
    jobs += [launch for launch in pending if launch.tokens > 1]
    until = clock() + seconds
    for done, job in enumerate(jobs):
        left = until - clock()
        if left <= 0:
            return
        if job is not None:
            share = left * _weight(job) / sum(_weight(other) for other in jobs[done:])
            tuning.take(job, search(job, measure, limits, seconds=share, clock=clock))
        elif compare is not None:
            _compare(tuning, compare, single)
        if progress is not None:
            progress(done + 1, len(jobs))


def _compare(tuning: Tuning, compare: Compare, single: Sequence[Launch]) -> None:
    unusable = {launch.site for launch in single if launch.key not in tuning.tiles}
    sites = [site for site in dict.fromkeys(launch.site for launch in single) if site not in unusable]
    if not sites:
        return
    points = compare(sites, tuning.table)
    tuning.crossover = {
        "indexed_below": crossing(points),
        "points": [{"density": d, "masked_ms": 1e3 * m, "indexed_ms": 1e3 * i} for d, m, i in points],
    }
    tuning.write()


def _weight(job: Launch | None) -> float:
    return _WEIGHT if job is not None and job.tokens > 1 else _WEIGHT_OF_ONE_TOKEN


def about(device: torch.device) -> dict[str, Any]:
    """Returns what a table's file says of the device, the versions, the date and the protocol."""
    found = environment(device)
    protocol = {
        "density": {"masked": MASKED_DENSITY, "indexed": INDEXED_DENSITY},
        "inputs": "normal random numbers, thresholds by quantile",
        "weights": "rotated, what a turn reads exceeds four times the L2",
        "timing": "replays of a CUDA graph of one call for each copy, by events; lists made before",
        "finalists": FINALISTS,
        "rounds": FINE_ROUNDS,
    }
    kept = {name: found[name] for name in ("device", "versions", "date", "gpu") if name in found}
    return kept | {"protocol": protocol}


def tune_device(
    launches: Sequence[Launch], out: Path, *, seconds: float, device: str = "cuda", progress: Progress | None = None
) -> Tuning:
    """Tunes launches of one dtype on a GPU; returns the table, a file in the folder `out` named after the device.

    Raises UnavailableError where there is no GPU, SparsifyError for a device that is none and where `Tuning` does.
    """
    timer = GraphTimer(_device(device))
    torch.cuda.set_device(timer.device)
    facts = about(timer.device)
    out.mkdir(parents=True, exist_ok=True)
    tuning = Tuning(out / file_name(facts["device"]), facts)
    measure = SiteMeasure(timer.device, timer, cache=cache_of(timer.device) or 0)
    tune(
        launches, tuning, measure, Limits.of(timer.device), seconds=seconds, progress=progress,
        compare=lambda sites, table: measure.compare(sites, table, launches[0].dtype),
    )  # fmt: skip
    return tuning


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SparsifyError(f"--device {name} is none; write cuda or cuda:1") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _line(key: str, found: Mapping[str, Any], tile: Tile | None) -> str:
    said = "none works" if tile is None else " ".join(map(str, astuple(tile)))
    gain = "" if found["gain"] is None else f", {1e6 * found['seconds']:.1f} µs, {found['gain']:.2f}× the rule's"
    return f"{key}: {said}{gain}{'' if found['complete'] else ' (unfinished)'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.tuning", description=__doc__)
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--shape", nargs="+", default=[], metavar="KxN1+N2")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=90.0, help="for everything together")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(arguments)

    def progress(done: int, total: int) -> None:
        sys.stderr.write(f"{done}/{total}\n")

    try:
        launches = launches_of(sites_of(args.model, args.shape), DTYPES[args.dtype], args.tokens)
        tuning = tune_device(launches, args.out, seconds=args.seconds, device=args.device, progress=progress)
    except SparsifyError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    lines = [_line(key, found, tuning.tiles.get(key)) for key, found in tuning.launches.items()]
    sys.stdout.write("\n".join([*lines, str(tuning.path)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
