"""The memory and the time that a conversion takes, stage by stage, from shapes and a few rates of the machine.

Memory is counted from how the stages work: what is alive at once at each one's worst moment. Time is the floating-point
work of its products at measured rates, and the passes over activations and scores that are bound by memory; constants
were fitted once to conversions that were measured (docs/plan.md). Both are estimates. Not covered: the speed of the
disk beyond hashing, the search for a speed, and the fit of a relufied model's MLPs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparsify.allocation import Size, Work
from sparsify.budget import Candidate, LinearShape
from sparsify.low_rank import is_exact
from sparsify.model_size import ModelSize
from sparsify.plan import ConversionPlan
from sparsify.svd_cost import Rates, svd_bytes, svd_seconds
from sparsify.weight_files import SINGLE_FILE_BYTES

_MB = 1 << 20
# A histogram of scores (sparsify.calibration): 65,536 counts of 8 bytes.
_HISTOGRAM_BYTES = (1 << 16) * 8
# Windows on which candidates are compared; steps, passes, batch and held-out part of learned compensation.
_COMPARED, _STEPS, _EPOCHS, _BATCH, _HELD_OUT = 8, 160, 24, 4, 1 / 8
# Batches that perplexity runs in, by windows and by logits.
_MEASURED_BATCH, _MEASURED_LOGITS = 8, 1 << 28
# The range that an estimate of time is given with: as far off as it was on what was measured.
TIME_RANGE = (0.5, 2.0)


@dataclass(frozen=True)
class Load:
    """What is run: calibration windows and tokens in each, windows for the card, and the process before the model.

    runs: conversions, of which a budget by quality tries several; held_out: windows that each of these is measured on;
    channel_contiguous: whether the layers' backend lays weights out anew, which a loaded file's mapping outlives.
    """

    windows: int
    seq_len: int
    eval_windows: int
    base_bytes: int
    base_seconds: float
    runs: int = 1
    held_out: int = 0
    channel_contiguous: bool = True
    mapped: bool = True


@dataclass(frozen=True)
class Stage:
    """One stage of a conversion: seconds that it takes in all, and bytes of memory at its worst moment.

    idle: of these, pages of the weights' files that are not used any more, which the system drops where it needs room.
    """

    name: str
    seconds: float
    bytes: int
    idle: int = 0

    @property
    def needed(self) -> int:
        return self.bytes - self.idle


def stages_in_memory(
    size: ModelSize, plan: ConversionPlan, work: Work, svd: str, load: Load, rates: Rates
) -> list[Stage]:
    """Returns the stages of a conversion with the whole model in memory, in order."""
    cost = _Cost(size, plan, work, svd, load, rates)
    every = [cost.load(), *cost.rotate(), *cost.allocate(), *cost.calibrate(), *cost.compare(), *cost.learn()]
    every += cost.swap()
    repeated = [replace(stage, seconds=stage.seconds * load.runs) for stage in (*every, *cost.try_out())]
    return [*repeated, *cost.measure(), cost.save()]


def streamed_peak(
    size: ModelSize, shapes: Mapping[str, LinearShape], ranks: Mapping[str, int], svd: str, load: Load
) -> int:
    """Returns the peak of a conversion block by block: base + two largest blocks + the largest linear's work + a batch.

    Two blocks: the one in memory, and its weights laid out anew or on their way to a file. The embedding's rows that
    the text names, at most the whole of it, and for the card the head with one batch of logits.
    """
    block = max(size.blocks)
    work = max(
        (_work_bytes(shape, svd_bytes(shape, ranks.get(name, 0), svd)) for name, shape in shapes.items()), default=0
    )
    activations = _forward_bytes(size, load.seq_len, 1)
    text = load.eval_windows * load.seq_len + load.windows * load.seq_len
    rows = min(size.vocabulary, text) * size.hidden * size.element_size
    head = 0
    if load.eval_windows:
        batch = _measured_batch(size, load.seq_len, load.eval_windows)
        head = size.vocabulary * size.hidden * size.element_size + _logit_bytes(size, load.seq_len, batch)
    histograms = 8 * _HISTOGRAM_BYTES * len(shapes) // max(len(size.blocks), 1)
    return load.base_bytes + _OWN_BYTES + max(2 * block + work + activations + histograms, rows + activations, head)


@dataclass(frozen=True)
class _Cost:
    """The stages of one conversion; all bytes are above what the process holds before the model."""

    size: ModelSize
    plan: ConversionPlan
    work: Work
    svd: str
    run: Load
    rates: Rates

    @property
    def weights(self) -> int:
        return self.size.dense_bytes

    @property
    def linears(self) -> int:
        return sum(shape.dense_bytes for shape in self.plan.shapes.values())

    @property
    def numbers(self) -> int:
        """Weights of all linears that become sparse layers."""
        return sum(shape.outputs * shape.inputs for shape in self.plan.shapes.values())

    @property
    def fitted(self) -> Mapping[str, tuple[Candidate, ...]]:
        """The candidates that are fitted and compared: those of one kind where the allocation has chosen."""
        if self.plan.settled:
            return self.plan.options
        kept = {name: options[-1].score for name, options in self.plan.options.items()}
        return {
            name: tuple({c.compensated: c for c in options if c.score == kept[name]}.values())
            for name, options in self.plan.options.items()
        }

    @property
    def ranks(self) -> dict[str, int]:
        """The largest rank that a linear is decomposed at."""
        return {name: max(c.rank for c in options) for name, options in self.plan.options.items()}

    @property
    def factors(self) -> int:
        """Bytes of all factors, which are held at once, and of the column norms."""
        held = 0
        for name, options in self.plan.options.items():
            shape, rank = self.plan.shapes[name], self.ranks[name]
            exact = rank and is_exact(self.svd, shape.outputs, shape.inputs, rank)
            held += shape.low_rank_bytes(rank) + 4 * shape.inputs * (1 + sum(c.scaled for c in options))
            held += 8 * (min(shape.outputs, shape.inputs) if exact else rank)
        return held

    def forward(self, windows: float, *, heads: float = 0.0) -> float:
        """Returns the seconds of so many windows through the blocks, and `heads` of them on to logits."""
        tokens = self.run.seq_len
        flops = tokens * (self.size.flops + self.size.attention * tokens)
        head = 2.0 * tokens * self.size.hidden * self.size.vocabulary
        passes = windows * tokens * self.size.moved * _PASSES + heads * tokens * self.size.vocabulary * _LOGIT_PASSES
        return (windows * flops + heads * head) / self.rates.model + passes / self.rates.values

    def products(self, times: float, casts: float = 0.0) -> float:
        """Returns the seconds of fp32 products of a window with every linear's weight, so many times.

        casts: how often the weights are made fp32 for them.
        """
        moved = sum(shape.outputs + shape.inputs for shape in self.plan.shapes.values())
        flops = 2.0 * self.run.seq_len * self.numbers * times
        passes = moved * self.run.seq_len * times * _ERROR_PASSES + casts * self.numbers
        return flops / self.rates.single + passes / self.rates.values

    def stage(self, name: str, seconds: float, extra: float, *, swapped: bool = False) -> Stage:
        idle = self._again() or (self._anew() if swapped else 0)
        return Stage(name, seconds, self.run.base_bytes + _OWN_BYTES + self.weights + int(extra), idle)

    def load(self) -> Stage:
        largest = max((8 * s.outputs * s.inputs for s in self.plan.shapes.values()), default=0)
        numbers = self.numbers if self.plan.options else 0
        seconds = self.run.base_seconds / self.run.runs + self.weights / _READ_RATE
        seconds += _NORM_PASSES * numbers / self.rates.values
        return self.stage("load", seconds, 2 * largest if self.plan.options else _FIRST_FORWARD)

    def rotate(self) -> list[Stage]:
        if not self.plan.rotated:
            return []
        hidden, tokens = self.size.hidden, self.run.seq_len * self.run.windows
        norms = 2 * len(self.size.blocks) + 1
        moments = norms * (2.0 * tokens * hidden**2 / self.rates.single + tokens * hidden * 8 / self.rates.values)
        numbers = self.numbers + 2 * hidden * self.size.vocabulary
        turned = 2.0 * numbers * hidden / self.rates.double + 6 * numbers / self.rates.values
        seconds = self.forward(self.run.windows) + moments + 9.0 * hidden**3 / self.rates.svd + turned
        largest = max(hidden * self.size.vocabulary, max(s.outputs * s.inputs for s in self.plan.shapes.values()))
        # What a rotation turns is written anew, and the file's mapping stays.
        again = self.weights if self.run.mapped else 0
        return [self.stage("rotate", seconds, again + 3 * 8 * largest + 8 * hidden * hidden * 3)]

    def allocate(self) -> list[Stage]:
        work = self.work
        decomposed = max(work.decompositions, 1.0 if any(self.ranks.values()) else 0.0)
        shapes = self.plan.shapes
        seconds = decomposed * sum(svd_seconds(shapes[n], rank, self.svd, self.rates) for n, rank in self.ranks.items())
        scores = sum(shape.inputs for shape in shapes.values()) * self.run.seq_len
        seconds += _TRIED * self.forward(work.forwards, heads=work.heads) + self.products(work.products)
        seconds += work.counted * scores / self.rates.scores + self._sampled()
        svd = max(
            (_work_bytes(shapes[n], svd_bytes(shapes[n], rank, self.svd)) for n, rank in self.ranks.items()), default=0
        )
        graph = 0.0
        if work.heads:
            graph = _logit_bytes(self.size, self.run.seq_len, work.batch) * _KL_COPIES
            graph += work.batch * self.run.seq_len * self.size.moved * self.size.element_size * _SAVED
        if not seconds:
            return []
        name = "allocate" if work.forwards else "decompose"
        return [self.stage(name, seconds, self._again() + self.factors + max(svd, graph))]

    def _sampled(self) -> float:
        """Returns the seconds of weighed errors: products of 256 rows with W, and of 512 inputs with these."""
        inputs = sum(s.inputs for s in self.plan.shapes.values())
        flops = self.work.sampled * (2.0 * 256 * self.numbers + 2.0 * 512 * 256 * inputs)
        return flops / self.rates.single + self.work.sampled * 512 * inputs * 12 / self.rates.values

    def calibrate(self) -> list[Stage]:
        scores = self._histograms() * self.run.seq_len * self.run.windows / self.rates.scores
        passes = 1.0
        if any(c.compensated for options in self.plan.options.values() for c in options) and not self._learns():
            passes = 2.0
        counted = sum(1 for _ in self._histogram_keys()) * _HISTOGRAM_BYTES
        activations = _forward_bytes(self.size, self.run.seq_len, 1)
        name = "calibrate"
        seconds = self.forward(passes * self.run.windows) + scores
        seconds += _FIT_SECONDS * sum(len(options) for options in self.fitted.values())
        return [self.stage(name, seconds, self._again() + self.factors + counted + activations)]

    def _histogram_keys(self) -> list[tuple[str, int]]:
        """Returns (linear, its inputs) of every histogram: of a site for magnitudes, a linear, a linear and a rank."""
        sites = {name: site.names for site in self.plan.targets.sites for name in site.names}
        keys: dict[tuple[object, ...], tuple[str, int]] = {}
        for name, options in self.fitted.items():
            for c in options:
                owner: object = sites[name] if c.score == "magnitude" else name
                key = (c.score, owner, c.rank if c.score == "residual-norm" else 0)
                keys.setdefault(key, (name, self.plan.shapes[name].inputs))
        return list(keys.values())

    def _histograms(self) -> int:
        return sum(inputs for _, inputs in self._histogram_keys())

    def compare(self) -> list[Stage]:
        windows = min(self.run.windows, _COMPARED)
        count = max((len(options) for options in self.fitted.values()), default=0)
        if not count and not self.plan.cut_mlps:
            return []
        seconds = self.forward(windows) + self.products(windows * (1 + max(count, 1)), windows)
        largest = max(self.plan.shapes.values(), key=lambda s: s.outputs * s.inputs)
        extra = 4 * largest.outputs * largest.inputs + 6 * 4 * self.run.seq_len * (largest.inputs + largest.outputs)
        return [self.stage("compare", seconds, self._again() + self.factors + extra)]

    def _learns(self) -> bool:
        options = self.plan.options.values()
        return any({c.compensated for c in ways} == {True, False} for ways in options)

    def learn(self) -> list[Stage]:
        if not self._learns() or self.run.windows < 2:
            return []
        held = math.ceil(self.run.windows * _HELD_OUT)
        steps = min(_STEPS, _EPOCHS * math.ceil((self.run.windows - held) / _BATCH))
        runs = 3.0 * steps * _BATCH + 10.0 * held
        seconds = _TRIED * self.forward(runs, heads=runs) + self.products(2.0 * min(self.run.windows, _COMPARED))
        graph = _logit_bytes(self.size, self.run.seq_len, _BATCH) * _KL_COPIES
        graph += _BATCH * self.run.seq_len * self.size.moved * self.size.element_size * _SAVED
        kept = held * self.run.seq_len * self.size.vocabulary * 4
        return [self.stage("compensate", seconds, self._again() + self.factors + graph + kept)]

    def swap(self) -> list[Stage]:
        """Weights are laid out as the kernels want them."""
        if not (self.run.channel_contiguous and self.plan.shapes):
            return []
        seconds = _LAYOUT_PASSES * self.numbers / self.rates.values
        return [self.stage("swap", seconds, self._swapped(), swapped=True)]

    def try_out(self) -> list[Stage]:
        """The perplexity of each try on held-out text."""
        if not self.run.held_out:
            return []
        return [Stage("held out", self.forward(self.run.held_out, heads=self.run.held_out), 0)]

    def measure(self) -> list[Stage]:
        if not self.run.eval_windows:
            return []
        windows = (1.0 + _SPARSE) * self.run.eval_windows
        batch = _measured_batch(self.size, self.run.seq_len, self.run.eval_windows)
        extra = _logit_bytes(self.size, self.run.seq_len, batch) + _forward_bytes(self.size, self.run.seq_len, batch)
        seconds = self.forward(windows, heads=windows)
        return [self.stage("measure", seconds, self._swapped() + extra, swapped=True)]

    def save(self) -> Stage:
        written = self.plan.weight_bytes.most
        # Weights that are laid out for the kernels are put back in rows: all at once where they are one file.
        largest = max((shape.dense_bytes for shape in self.plan.shapes.values()), default=0)
        whole = self.size.dense_bytes <= SINGLE_FILE_BYTES
        again = (self.linears if whole else largest) if self.run.channel_contiguous else 0
        seconds = written / self.rates.hashed + written / _WRITE_RATE
        seconds += _LAYOUT_PASSES / 2 * self.numbers / self.rates.values if again else 0.0
        return self.stage("save", seconds, self._swapped() + again, swapped=True)

    def _again(self) -> int:
        """Bytes of the files' pages that a rotation leaves behind."""
        return self.weights if self.plan.rotated and self.run.mapped else 0

    def _anew(self) -> int:
        """Bytes of the files' pages that weights laid out anew leave behind."""
        return self.linears if self.run.channel_contiguous and self.run.mapped and not self.plan.rotated else 0

    def _swapped(self) -> int:
        """Bytes beside the loaded weights once the layers are swapped: weights laid out anew, what was added."""
        return self._again() + self._anew() + self.plan.added_bytes.most + self.factors


# Passes over what a forward moves between products; over logits; copies of a batch's fp32 logits alive in the
# divergence of two models; parts of what a forward moves that a backward keeps.
_PASSES, _LOGIT_PASSES, _KL_COPIES, _SAVED = 6.0, 3.0, 8.0, 4.5
# What a forward or a backward of a model with candidates in it takes, by a dense forward's time.
_TRIED = 1.5
# Passes over a linear's inputs and outputs while a candidate's error is summed; a sparse forward's time by a dense
# one's; seconds for a candidate's threshold and tensors; what a process grows by while it first runs a model.
_ERROR_PASSES, _SPARSE, _FIT_SECONDS, _OWN_BYTES = 12.0, 2.2, 0.004, 100 * _MB
# Passes that column norms in fp64 and a weight's new layout are worth; bytes a second from and to the disk.
_NORM_PASSES, _LAYOUT_PASSES = 25.0, 18.0
_READ_RATE, _WRITE_RATE = 1e9, 1e9
_FIRST_FORWARD = 64 * _MB


def _work_bytes(shape: LinearShape, svd: int) -> int:
    """Returns what one linear needs beside its weight: its decomposition, or R and its parts in fp32."""
    return max(svd, 3 * 4 * shape.outputs * shape.inputs, 2 * 8 * shape.outputs * shape.inputs)


def _forward_bytes(size: ModelSize, seq_len: int, batch: int) -> int:
    return 3 * batch * seq_len * size.widest * max(size.element_size, 4)


def _logit_bytes(size: ModelSize, seq_len: int, batch: int) -> int:
    """Returns the logits of a batch in the model's dtype and one fp32 copy."""
    return batch * seq_len * size.vocabulary * (size.element_size + 4)


def _measured_batch(size: ModelSize, seq_len: int, windows: int) -> int:
    return max(1, min(_MEASURED_BATCH, windows, _MEASURED_LOGITS // (seq_len * size.vocabulary)))


def work_size(plan: ConversionPlan, size: ModelSize, load: Load, sparsity: float) -> Size:
    """Returns what the cost of an allocation depends on."""
    counts: Sequence[tuple[Candidate, ...]] = list(plan.options.values())
    chosen = sum(len(options) > 1 for options in counts)
    most = max((len(options) for options in counts), default=0)
    return Size(len(plan.shapes), len(size.blocks), chosen, most, load.windows, sparsity)
