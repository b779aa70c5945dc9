"""The search for tiles on one GPU: which cut of each launch is fastest, and where lists beat masks.

    python -m sparsify.evals.tuning --model llama-3-8b --seconds 90 --out DIR      (as `sparsify tune`)

A launch (`tiles.key_of`) starts at the tile of the rule. Three steps narrow it down, each from the best of the one
before: block sizes and warps, then splits, then stages; the best few and the rule's are then timed again in turns, and
the rule's stays unless another is faster by a percent. A tile that does not compile, does not fit or computes
something else is left out and counted. The time is shared over the launches, those of one token first; what one does
not use goes to the next. The table is written after every launch and is valid at any moment; a launch that was
finished is not searched again. The search takes its measurement and its clock: `SiteMeasure` is the one for a GPU.
Inputs are random, half of the channels kept for masks, a tenth for lists, by each token. Not covered: attention, norms.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import SparsifyError, suggest
from sparsify.evals.gpu_kernel_speed import MODELS
from sparsify.evals.gpu_timing import (
    ACTIVATION,
    DTYPES,
    TOLERANCES,
    Call,
    GraphTimer,
    Site,
    SiteCopies,
    Timer,
    Turn,
    copies_on,
    error_of,
    line_of,
)
from sparsify.evals.interleaving import Progress, in_turns, order
from sparsify.evals.machine import cache_of, environment
from sparsify.evals.stream import wait
from sparsify.kernels.gpu.tiles import (
    MOST_TOKENS,
    RULES,
    Table,
    Tile,
    file_name,
    key_of,
    read_table,
    table_document,
    tile_for,
)
from sparsify.kernels.spec import SparseTensors

# The share of channels that a token keeps while a launch of a form is tuned.
MASKED_DENSITY, INDEXED_DENSITY = 0.5, 0.1
# Where both forms are compared; above, lists cannot pay.
CROSSOVER_DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_BLOCKS_N, _BLOCKS_K, _WARPS = (64, 128, 256, 512), (8, 16, 32, 64), (2, 4, 8)
_SPLITS, _STAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), (2, 3, 4, 5, 6, 8, 12)
# Programs for each multiprocessor: where a tile starts, and the most.
_WAVES, _MOST_WAVES = 4, 16
# Values of a block in a thread: fewer than 16 bytes make narrow loads, more do not fit into its registers.
_LEAST_BYTES, _MOST_VALUES = 16, 64
# On its way from memory at once, for each program, where a tile starts.
_BYTES_IN_FLIGHT = 32768
# Tiles in the first step, and how many of the best are varied, for one token and for more.
_FIRST, _VARIED = {True: 36, False: 12}, {True: 2, False: 1}
_FINALISTS, _FINE_ROUNDS = 3, 7
# Parts of a launch's time after which the steps end.
_ENDS = (0.5, 0.75, 0.9, 1.0)
_CLEARLY = 1.01
_CROSSOVER_ROUNDS = 5
# Of the time: one token, and the comparison of forms, which is about one token, come first.
_WEIGHT_OF_ONE_TOKEN, _WEIGHT = 4.0, 1.0

# KxN1+N2: linears [N1, K] and [N2, K] that share their input.
_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*(?:\+[1-9]\d*){0,2})")

Measure = Callable[["Launch", Tile], float]
# (density, seconds masked, seconds indexed) of sites together, by rising density, with a table's tiles.
Compare = Callable[[Sequence[Site], Table], list[tuple[float, float, float]]]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Launch:
    """One entry of a table: a site of linears in a dtype, for so many tokens, in one form."""

    site: Site
    dtype: torch.dtype
    tokens: int
    indexed: bool

    @property
    def key(self) -> str:
        return key_of(self.site.inputs, self.site.outputs, self.dtype, self.tokens, indexed=self.indexed)

    @property
    def density(self) -> float:
        return INDEXED_DENSITY if self.indexed else MASKED_DENSITY


@dataclass(frozen=True)
class Limits:
    """What a device sets: its multiprocessors, and the bytes of shared memory that a program can have."""

    multiprocessors: int
    shared_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> "Limits":
        """Returns those of a GPU."""
        properties: Any = torch.cuda.get_device_properties(device)
        # The system keeps 1 KB of it for each program.
        return cls(properties.multi_processor_count, properties.shared_memory_per_multiprocessor - 1024)


class UnfitError(Exception):
    """A tile that cannot be used for a launch. wrong: it ran and computed something else."""

    def __init__(self, problem: str, *, wrong: bool = False) -> None:
        super().__init__(problem)
        self.wrong = wrong


@dataclass(frozen=True)
class Found:
    """What a search found: seconds of the tile and of the rule's, None for one that cannot be used.

    complete: no step was cut short by the time.
    """

    tile: Tile | None
    seconds: float | None
    rule_seconds: float | None
    tried: int
    failed: int
    wrong: int
    complete: bool
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns what a table's file says of the launch; gain is over the rule's tile."""
        known = {name: value for name, value in vars(self).items() if name != "tile"}
        gain = self.rule_seconds / self.seconds if self.seconds and self.rule_seconds else None
        return known | {"gain": gain}


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


def launches_of(sites: Iterable[Site], dtype: torch.dtype, tokens: Iterable[int]) -> list[Launch]:
    """Returns both forms of every site and number of tokens, each key once, fewest tokens first.

    Raises SparsifyError for a number of tokens that has no entry of its own: there are 1, 2, 4 and 8.
    """
    buckets = [1 << exponent for exponent in range(MOST_TOKENS.bit_length())]
    numbers, every = sorted(set(tokens)), list(sites)
    if not numbers or set(numbers) - set(buckets):
        raise SparsifyError(f"the numbers of tokens are {numbers}: a table has entries for 1, 2, 4 and 8")
    found: dict[str, Launch] = {}
    for number, site, indexed in product(numbers, every, (False, True)):
        launch = Launch(site, dtype, number, indexed)
        found.setdefault(launch.key, launch)
    return list(found.values())


# ---- candidates ----


def rule_of(launch: Launch, limits: Limits) -> Tile:
    """Returns the tile that is used where no table has the launch."""
    shape = launch.site.inputs, launch.site.outputs, launch.dtype, launch.tokens
    return tile_for(*shape, indexed=launch.indexed, multiprocessors=limits.multiprocessors)


def starts(launch: Launch, limits: Limits) -> list[Tile]:
    """Returns the rule's tile and others by blocks and warps, nearest to it first, with splits and stages to suit."""
    rule = rule_of(launch, limits)
    made = [_suited(launch, limits, n, k, warps) for n, k, warps in product(_BLOCKS_N, _BLOCKS_K, _WARPS)]
    fitting = [tile for tile in made if tile != rule and fits(launch, limits, tile)]
    return [rule, *sorted(fitting, key=lambda tile: _distance(tile, rule))[: _FIRST[launch.tokens == 1]]]


def variations(launch: Launch, limits: Limits, tile: Tile, name: str) -> list[Tile]:
    """Returns the tile with its other numbers of splits or stages, those nearest to its own first."""
    values = {"splits": _SPLITS, "stages": _STAGES}[name]
    made = [replace(tile, **{name: value}) for value in values if value != getattr(tile, name)]
    return sorted((t for t in made if fits(launch, limits, t)), key=lambda other: _distance(other, tile))


def fits(launch: Launch, limits: Limits, tile: Tile) -> bool:
    """Returns whether a tile is worth a trial: wide loads, registers, shared memory, and the number of programs."""
    one, size = launch.tokens == 1, launch.dtype.itemsize
    values = tile.block_n * tile.block_k / (32 * tile.warps)
    if values * size < _LEAST_BYTES or values > _MOST_VALUES * (1 if one else 2):
        return False
    # Tensor cores take 16 channels at once; a warp has columns of its own.
    if not one and (tile.block_k < 16 or tile.block_n > 256 or tile.block_n < 16 * tile.warps):
        return False
    if tile.stages * tile.block_n * tile.block_k * size > limits.shared_bytes:
        return False
    if tile.block_n >= 2 * max(launch.site.outputs) or tile.splits > _most_splits(launch, tile.block_k):
        return False
    programs = _blocks(launch, tile.block_n) * tile.splits
    enough = 2 * programs >= limits.multiprocessors or tile.splits == _most_splits(launch, tile.block_k)
    return enough and programs <= max(_MOST_WAVES * limits.multiprocessors, _blocks(launch, tile.block_n))


def _suited(launch: Launch, limits: Limits, block_n: int, block_k: int, warps: int) -> Tile:
    blocks = _blocks(launch, block_n)
    wanted = round(_WAVES * limits.multiprocessors / blocks)
    splits = min(max(wanted, 1), _most_splits(launch, block_k))
    stages = _BYTES_IN_FLIGHT // (block_n * block_k * launch.dtype.itemsize)
    if launch.indexed and launch.tokens > 1:
        # Every other stage goes into what the list points to: four of them keep one block of weights on its way.
        stages *= 2
    stages = min(max(stages, 2), max(_STAGES))
    return Tile(block_n, block_k, splits, warps, stages)


def _most_splits(launch: Launch, block_k: int) -> int:
    """Parts of the channels that are read with a block of them in each, up to what a tile may have."""
    kept = 1.0 - (1.0 - launch.density) ** launch.tokens if launch.indexed else 1.0
    return min(max(int(launch.site.inputs * kept / block_k), 1), max(_SPLITS))


def _blocks(launch: Launch, block_n: int) -> int:
    return sum(-(-n // block_n) for n in launch.site.outputs)


def _distance(tile: Tile, other: Tile) -> float:
    return sum(abs(math.log2(a / b)) for a, b in zip(astuple(tile), astuple(other), strict=True))


# ---- search ----


@dataclass
class _Trials:
    """The tiles of a launch that were measured, and those that could not be."""

    launch: Launch
    measure: Measure
    clock: Clock
    seconds: dict[Tile, float] = field(default_factory=dict)
    # Why, and whether it was wrong. Not the exceptions: they would hold the tensors of the launch.
    unfit: dict[Tile, tuple[str, bool]] = field(default_factory=dict)

    def run(self, tiles: Iterable[Tile], until: float) -> bool:
        """Measures the tiles that were not yet; returns whether the time was enough."""
        for tile in tiles:
            if tile in self.seconds or tile in self.unfit:
                continue
            if self.clock() >= until:
                return False
            try:
                self.seconds[tile] = self.measure(self.launch, tile)
            except UnfitError as problem:
                self.unfit[tile] = str(problem), problem.wrong
        return True

    def best(self, number: int) -> list[Tile]:
        return sorted(self.seconds, key=lambda tile: self.seconds[tile])[:number]


def search(launch: Launch, measure: Measure, limits: Limits, *, seconds: float, clock: Clock = time.monotonic) -> Found:
    """Returns the fastest tile of a launch that was found within the seconds; the rule's is measured in any case.

    measure returns the seconds of the launch with a tile, each time anew, and raises UnfitError for one that cannot be
    used; what else it raises ends the search.
    """
    started = clock()
    ends = [started + part * seconds for part in _ENDS]
    trials = _Trials(launch, measure, clock)
    rule, varied = rule_of(launch, limits), _VARIED[launch.tokens == 1]
    trials.run([rule], math.inf)
    complete = trials.run(starts(launch, limits), ends[0])
    for name, end in zip(("splits", "stages"), ends[1:], strict=False):
        tiles = [other for tile in trials.best(varied) for other in variations(launch, limits, tile, name)]
        complete = trials.run(tiles, end) and complete
    tried, wrong = len(trials.seconds) + len(trials.unfit), sum(wrong for _, wrong in trials.unfit.values())
    counts = {"tried": tried, "failed": len(trials.unfit) - wrong, "wrong": wrong}
    if not trials.seconds:
        return Found(None, None, None, **counts, complete=complete, problem=trials.unfit[rule][0])
    finalists = list(dict.fromkeys([*trials.best(_FINALISTS), *([rule] if rule in trials.seconds else [])]))
    timed, all_rounds = _again(launch, measure, finalists, ends[3], clock)
    best = min(timed, key=lambda tile: timed[tile])
    if rule in timed and timed[rule] < _CLEARLY * timed[best]:
        best = rule
    problem = trials.unfit[rule][0] if rule in trials.unfit else None
    return Found(best, timed[best], timed.get(rule), **counts, complete=complete and all_rounds, problem=problem)


def _again(
    launch: Launch, measure: Measure, tiles: Sequence[Tile], until: float, clock: Clock
) -> tuple[dict[Tile, float], bool]:
    """Measures the tiles in turns; returns their medians, and whether the time was enough for all rounds."""
    names = {str(index): tile for index, tile in enumerate(tiles)}
    found: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    for index in range(_FINE_ROUNDS):
        if index and clock() >= until:
            break
        for name in order(list(names), index):
            found[names[name]].append(measure(launch, names[name]))
    medians = {tile: statistics.median(values) for tile, values in found.items()}
    return medians, len(found[tiles[0]]) == _FINE_ROUNDS


def crossing(points: Sequence[tuple[float, float, float]]) -> float:
    """Returns the density under which lists are faster, from (density, seconds masked, seconds indexed), rising.

    0 where they never are, the last density where they always are.
    """
    before, ahead = 0.0, 0.0
    for density, masked, indexed in points:
        saved = masked - indexed
        if saved <= 0:
            share = ahead / (ahead - saved) if ahead else 0.0
            return round(before + share * (density - before), 3)
        before, ahead = density, saved
    return before


# ---- a whole table ----


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
        staged = self.path.with_name(f".{self.path.name}.tmp")
        staged.write_text(json.dumps(self.document(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(staged, self.path)


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
        "finalists": _FINALISTS,
        "rounds": _FINE_ROUNDS,
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


# ---- measuring on a device ----


@dataclass(frozen=True)
class _Subject:
    """The tensors of one launch: copies of its site, what is right for the first, and lists where it needs them."""

    launch: Launch
    copies: SiteCopies
    tensors: list[list[SparseTensors]]
    expected: list[Tensor]
    lists: list[Any] | None
    turns: dict[Tile, Turn] = field(default_factory=dict)


class SiteMeasure:
    """Seconds of a launch with a tile, on a device: weights rotated, the first result checked, turns made by a timer.

    Holds the weights of one launch at a time. cache: bytes of the device's L2. Raises UnfitError for a tile that cannot
    be used.
    """

    def __init__(self, device: torch.device, timer: Timer, *, cache: int) -> None:
        self._device, self._timer, self._cache = device, timer, cache
        self._subject: _Subject | None = None

    @torch.no_grad()
    def __call__(self, launch: Launch, tile: Tile) -> float:
        if self._subject is None or self._subject.launch != launch:
            # Before the next is made: two of them may not fit.
            self._subject = None
            self._subject = self._made(launch)
        turns = self._subject.turns
        if tile not in turns:
            turns[tile] = self._turn(self._subject, tile)
        return statistics.median(turns[tile]())

    @torch.no_grad()
    def compare(self, sites: Sequence[Site], table: Table, dtype: torch.dtype) -> list[tuple[float, float, float]]:
        """Returns (density, seconds masked, seconds indexed) of one token over all sites, lists made in the launch."""
        from sparsify.kernels.gpu.site import multiprocessors_of

        self._subject = None
        totals = {density: [0.0, 0.0] for density in CROSSOVER_DENSITIES}
        cases = list(product(CROSSOVER_DENSITIES, (False, True)))
        for site in sites:
            copies = self._copies(site, dtype, 1, min(CROSSOVER_DENSITIES))
            turns: dict[str, Turn] = {}
            for density, indexed in cases:
                tile = tile_for(
                    site.inputs, site.outputs, dtype, 1, indexed=indexed,
                    multiprocessors=multiprocessors_of(self._device), table=table,
                )  # fmt: skip
                call = _call(copies, copies.tensors(1.0 - density), tile, indexed=indexed, lists=None)
                turns[f"{density} {indexed}"] = self._timer(call, len(copies))
            rounds = in_turns(turns, _CROSSOVER_ROUNDS)
            for density, indexed in cases:
                totals[density][indexed] += statistics.median(chain.from_iterable(rounds[f"{density} {indexed}"]))
        return [(density, masked, indexed) for density, (masked, indexed) in totals.items()]

    def _made(self, launch: Launch) -> _Subject:
        from sparsify.kernels.gpu.scratch import scratch_of
        from sparsify.kernels.gpu.site import run_select

        copies = self._copies(launch.site, launch.dtype, launch.tokens, launch.density)
        tensors = copies.tensors(1.0 - launch.density)
        lists = None
        if launch.indexed:
            scratch = scratch_of(self._device)
            lists = [
                run_select(x, site, scratch=scratch, up=up, activation=ACTIVATION)
                for x, up, site in zip(copies.x, copies.up, tensors, strict=True)
            ]
        return _Subject(launch, copies, tensors, copies.expected(tensors[0]), lists)

    def _turn(self, subject: _Subject, tile: Tile) -> Turn:
        launch = subject.launch
        call = _call(subject.copies, subject.tensors, tile, indexed=launch.indexed, lists=subject.lists)
        try:
            error = error_of(call(0), subject.expected)
            turn = self._timer(call, len(subject.copies)) if error <= TOLERANCES[launch.dtype] else None
        except Exception as raised:
            # A compiler or a launch can fail in any way. Where the device itself is broken, this line raises.
            wait(self._device)
            raise UnfitError(line_of(raised)) from raised
        if turn is None:
            raise UnfitError(f"wrong by {error:.1e}", wrong=True)
        return turn

    def _copies(self, site: Site, dtype: torch.dtype, tokens: int, density: float) -> SiteCopies:
        number = copies_on(self._device, site.nbytes(dtype), density, cache=self._cache)
        return SiteCopies(site, dtype, tokens, self._device, number)


def _call(copies: SiteCopies, tensors: Any, tile: Tile, *, indexed: bool, lists: Sequence[Any] | None) -> Call:
    from sparsify.kernels.gpu.scratch import scratch_of
    from sparsify.kernels.gpu.site import run_site

    scratch = scratch_of(copies.device)
    return lambda index: run_site(
        copies.x[index], tensors[index], scratch=scratch, up=copies.up[index], activation=ACTIVATION,
        lists=None if lists is None else lists[index], indexed=indexed, tile=tile,
    )  # fmt: skip


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
