"""Where dense is faster: a sparse product against the best dense one, by tokens at once and by sparsity.

One linear of the model, its largest, with inputs recorded from the model on real tokens and TEAL's thresholds for them.
The more tokens share a step, the more channels some of them keeps. Dense is the fastest of torch's linear, with oneDNN
and without, on row-major weights and our own kernel on both layouts. Needs the native kernels.
Not covered: a whole step, attention, more tokens than one call of the kernels takes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.calibration import ScoreHistogram, hooked, run_batches
from sparsify.errors import SparsifyError
from sparsify.evals.cold_calls import Call, Cold, Copies, cold_turns, torch_calls
from sparsify.evals.interleaving import Progress, Spread, ratio
from sparsify.evals.machine import environment
from sparsify.evals.stream import Stream, require_native
from sparsify.kernels import native
from sparsify.kernels.reference import keep_mask
from sparsify.kernels.spec import SparseTensors
from sparsify.runtime import dense, sparse_layers
from sparsify.targets import dense_weight, find_targets

BATCHES = (1, 2, 4, 8)
SPARSITIES = (0.0, 0.25, 0.5, 0.7, 0.9)
# Recorded positions of a window that are not used: a first token's activations are like no other's.
_FIRST = 4


@dataclass(frozen=True)
class Cell:
    """One batch at one sparsity. kept: share of channels that some token of the batch keeps; ratio: dense / sparse.

    faster: "sparse" or "dense" where the ratio's p10 to p90 lies on one side of 1, else "neither".
    """

    batch: int
    sparsity: float
    kept: float
    sparse_ms: Spread
    dense_ms: Spread
    dense: str
    ratio: Spread
    faster: str


@dataclass(frozen=True)
class Crossover:
    """All cells of one linear [outputs, inputs] of the model; waited_for_cpu: the worst batch's share of `CpuWait`."""

    linear: str
    outputs: int
    inputs: int
    dtype: str
    rounds: int
    cells: list[Cell]
    stream_gb_per_second: Spread
    waited_for_cpu: float | None
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns one document, with what the environment holds at its top."""
        document = asdict(self)
        shared: dict[str, Any] = document.pop("environment")
        return document | shared


def crossover(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    batches: Sequence[int] = BATCHES,
    sparsities: Sequence[float] = SPARSITIES,
    rounds: int = 15,
    progress: Progress | None = None,
) -> Crossover:
    """Measures every cell, with inputs from tokens [N, S] int64 run through the dense model.

    Raises UnavailableError without the native kernels, SparsifyError for a model that is not on the CPU.
    """
    require_native()
    if model.device.type != "cpu":
        raise SparsifyError(f"the crossover is measured with the CPU kernels, and this model is on {model.device}")
    name, linear = _largest(model, tokens)
    inputs = _recorded(model, name, linear, tokens)
    copies, stream = Copies.of(dense_weight(linear)), Stream(model.device)
    thresholds = {sparsity: _threshold(inputs, sparsity) for sparsity in sparsities}
    cells: list[Cell] = []
    speeds: list[float] = []
    waits: list[float] = []
    for done, batch in enumerate(batches):
        x = _batches(inputs, batch, len(copies.rows))
        measured = cold_turns(_calls(x, copies, thresholds), len(x), stream, rounds)
        cells += _cells(measured, batch, {s: _kept(x, t) for s, t in thresholds.items()})
        speeds += measured.stream
        waits += [] if measured.waited_for_cpu is None else [measured.waited_for_cpu]
        if progress is not None:
            progress(done + 1, len(batches))
    return Crossover(
        linear=name,
        outputs=copies.rows[0].shape[0],
        inputs=copies.rows[0].shape[1],
        dtype=str(copies.rows[0].dtype).removeprefix("torch."),
        rounds=rounds,
        cells=cells,
        stream_gb_per_second=Spread.of(speeds),
        waited_for_cpu=max(waits, default=None),
        environment=environment(model.device),
    )


def _largest(model: PreTrainedModel, tokens: Tensor) -> tuple[str, nn.Module]:
    """Returns the largest linear that is or could be converted, of the middle one of the blocks that have it."""
    converted: dict[str, nn.Module] = dict(sparse_layers(model))
    targets = converted or {name: model.get_submodule(name) for name in find_targets(model, tokens[:1, :8]).names}
    sizes = {name: dense_weight(module).numel() for name, module in targets.items()}
    largest = [name for name, size in sizes.items() if size == max(sizes.values())]
    kinds = [name for name in largest if name.rsplit(".", 1)[-1] == largest[0].rsplit(".", 1)[-1]]
    name = kinds[len(kinds) // 2]
    return name, targets[name]


def _recorded(model: PreTrainedModel, name: str, linear: nn.Module, tokens: Tensor) -> Tensor:
    """Returns the linear's inputs [N, I] over the tokens, windows and positions shuffled."""
    seen: list[Tensor] = []
    with dense(model), hooked({name: linear}, lambda _, x: seen.append(x[:, _FIRST:].flatten(0, -2))):
        run_batches(model, tokens, "record", None)
    inputs = torch.cat(seen)
    return inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))]


def _threshold(inputs: Tensor, sparsity: float) -> Tensor:
    if sparsity == 0.0:
        return torch.tensor(-1.0)
    histogram = ScoreHistogram()
    histogram.add(inputs)
    return torch.tensor(histogram.threshold(1.0 - sparsity))


def _batches(inputs: Tensor, batch: int, number: int) -> list[Tensor]:
    """Returns `number` inputs [batch, I] of different tokens, from the start again where there are too few."""
    rows = inputs.repeat(-(-number * batch // len(inputs)), 1)
    return [rows[index * batch : (index + 1) * batch].contiguous() for index in range(number)]


def _calls(x: list[Tensor], copies: Copies, thresholds: dict[float, Tensor]) -> dict[str, Call]:
    every = torch.tensor(-1.0)
    return {
        **torch_calls(x, copies.rows),
        "our kernel, row-major": _native(x, copies.rows, every),
        **{str(sparsity): _native(x, copies.channels, threshold) for sparsity, threshold in thresholds.items()},
        "our kernel": _native(x, copies.channels, every),
    }


def _native(x: list[Tensor], weights: list[Tensor], threshold: Tensor) -> Call:
    sites = [(SparseTensors(weight, None, threshold),) for weight in weights]
    return lambda index: native.run(x[index], sites[index])


def _cells(measured: Cold, batch: int, kept: dict[float, float]) -> list[Cell]:
    times = {name: Spread.of([1e3 * s for round in rounds for s in round]) for name, rounds in measured.seconds.items()}
    dense_sides = [name for name in times if name not in map(str, kept)]
    best = min(dense_sides, key=lambda name: times[name].median)
    cells = []
    for sparsity, share in kept.items():
        found = ratio(measured.seconds[best], measured.seconds[str(sparsity)])
        faster = "sparse" if found.p10 > 1.0 else "dense" if found.p90 < 1.0 else "neither"
        cells.append(Cell(batch, sparsity, share, times[str(sparsity)], times[best], best, found, faster))
    return cells


def _kept(x: list[Tensor], threshold: Tensor) -> float:
    return float(torch.stack([keep_mask(rows, threshold).any(0).float().mean() for rows in x]).mean())
