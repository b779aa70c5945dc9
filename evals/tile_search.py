"""The search for the tile of one launch: candidates near the rule's, three steps, and a final in turns, within a time.

A launch (`tiles.key_of`) starts at the tile of the rule. Three steps narrow it down, each from the best of the one
before: block sizes and warps, then splits, then stages; the best few and the rule's are then timed again in turns, and
the rule's stays unless another is faster by a percent. A tile that does not compile, does not fit or computes
something else is left out and counted. The search takes its measurement and its clock: `tile_measure` has the one for a
GPU. Not covered: several launches (`tuning`).
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import product
from typing import Any

import torch

from sparsify.errors import SparsifyError
from sparsify.evals.gpu_timing import Site
from sparsify.evals.interleaving import order
from sparsify.kernels.gpu.tiles import MOST_TOKENS, Tile, key_of, tile_for

# The share of channels that a token keeps while a launch of a form is tuned.
MASKED_DENSITY, INDEXED_DENSITY = 0.5, 0.1
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
# The best that are timed again, and how often.
FINALISTS, FINE_ROUNDS = 3, 7
# Parts of a launch's time after which the steps end.
_ENDS = (0.5, 0.75, 0.9, 1.0)
_CLEARLY = 1.01

Measure = Callable[["Launch", Tile], float]
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
    finalists = list(dict.fromkeys([*trials.best(FINALISTS), *([rule] if rule in trials.seconds else [])]))
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
    for index in range(FINE_ROUNDS):
        if index and clock() >= until:
            break
        for name in order(list(names), index):
            found[names[name]].append(measure(launch, names[name]))
    medians = {tile: statistics.median(values) for tile, values in found.items()}
    return medians, len(found[tiles[0]]) == FINE_ROUNDS


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
