"""What a decoded token costs on this machine: milliseconds by density for each shape of linear, and the rest.

Measured in the model itself, as it decodes: one shape's linears at one density, all others with every channel kept; all
such settings, every channel kept, none kept and every dense side in turns in one run. What a shape costs at a density
is the step's time less that with none of its channels kept. So caches are as full, threads as busy and calls as many as
in real decoding. Costs are scaled by one factor so that with the rest they add up to what every channel costs. A time
is the 10th percentile of its steps: what disturbs a step only makes it longer. A prediction adds the shapes up by the
share of bytes that each linear touches: a low rank counts as its bytes.
Not covered: a GPU, several sequences, contexts of other lengths.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration import Calibration
from sparsify.conversion import convert
from sparsify.errors import SparsifyError
from sparsify.evals.decoding import WARM_UP_STEPS, Side, count, decode
from sparsify.evals.interleaving import Progress, Spread, in_turns
from sparsify.evals.machine import CpuWait, environment
from sparsify.evals.shapes import teal_thresholds
from sparsify.evals.sides import prepared, sides_of
from sparsify.ledger import ledger_of, rest_bytes
from sparsify.methods.teal import Teal
from sparsify.runtime import sparse_layers
from sparsify.strict import from_mapping, read_json
from sparsify.targets import find_targets, linear_shapes

SCHEMA_VERSION = 1
# Nominal; what is written down is what the measured steps really kept.
_SPARSITIES = (0.9, 0.75, 0.5, 0.25)
_EVERY, _NONE = "every channel kept", "no channel kept"
_MOST_PROMPT, _MOST_STEPS = 64, 24
# What must be the same for a table to hold.
_MACHINE = ("device", "cpu", "threads", "isa")


@dataclass(frozen=True)
class ShapeCost:
    """All `count` linears [outputs, inputs] of the model: points of (density, ms a token for all of them together)."""

    outputs: int
    inputs: int
    count: int
    points: list[list[float]]

    def ms(self, share: float) -> float:
        """Returns the milliseconds of one linear that touches a share of its dense bytes, linear between points."""
        densities, ms = np.array(self.points).T
        return float(np.interp(share, densities, ms)) / self.count


@dataclass(frozen=True)
class CostTable:
    """Costs of one model's structure on one machine.

    dense_ms: of the dense sides; rest_ms: of a token with no channel kept: attention, norms, head, calls.
    """

    machine: dict[str, Any]
    versions: dict[str, Any]
    dtype: str
    rest_bytes: int
    prompt_tokens: int
    steps: int
    rounds: int
    dense_ms: dict[str, float]
    rest_ms: float
    shapes: list[dict[str, Any]]
    waited_for_cpu: float | None

    @property
    def costs(self) -> dict[tuple[int, int], ShapeCost]:
        found = [from_mapping(ShapeCost, entry, where="cost table") for entry in self.shapes]
        return {(cost.outputs, cost.inputs): cost for cost in found}

    @property
    def best_dense(self) -> str:
        return min(self.dense_ms, key=lambda name: self.dense_ms[name])

    def predicted_ms(self, sparsity: float) -> float:
        """Returns the milliseconds of a token where every linear leaves out this share of its bytes."""
        return self.rest_ms + sum(cost.count * cost.ms(1.0 - sparsity) for cost in self.costs.values())

    def predicted_speedup(self, sparsity: float) -> float:
        """Returns how many times as fast as the best dense side a token is predicted to be."""
        return self.dense_ms[self.best_dense] / self.predicted_ms(sparsity)

    def speedup_of(self, linears: list[tuple[int, int, float]]) -> float:
        """The same for linears (outputs, inputs, share of dense bytes touched), whatever their shares are."""
        costs = self.costs
        ms = self.rest_ms + sum(costs[outputs, inputs].ms(share) for outputs, inputs, share in linears)
        return self.dense_ms[self.best_dense] / ms

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION} | asdict(self)

    def save(self, path: Path) -> None:
        """Writes the table as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def touched_shares(model: PreTrainedModel) -> list[tuple[int, int, float]]:
    """Returns (outputs, inputs, share of dense bytes touched) of each linear of a converted model, by its ledger."""
    return [(e.outputs, e.inputs, e.touched_bytes / e.dense_bytes) for e in ledger_of(model).linears]


def read_cost_table(path: Path, model: PreTrainedModel) -> CostTable:
    """Returns the table in a file, for a model, dense or converted, on this machine.

    Raises SparsifyError for a file that is not one, or one of another machine or another model's shapes.
    """
    data = read_json(path)
    version = data.pop("schema_version", None) if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise SparsifyError(f"{path} is not a cost table (schema_version {version!r}): name another file")
    table = from_mapping(CostTable, data, where=str(path))
    here = _machine(model)
    there = table.machine
    differs = [f"{n} {there.get(n)!r}, here {value!r}" for n, value in here.items() if there.get(n) != value]
    if differs:
        raise SparsifyError(
            f"{path} was measured on another machine: {'; '.join(differs)}. Name a file that is not there yet, and it "
            "is measured here"
        )
    counts = {shape: cost.count for shape, cost in table.costs.items()}
    expected = {shape: len(names) for shape, names in _shapes(model).items()}
    dtype = str(model.dtype).removeprefix("torch.")
    if (counts, table.rest_bytes, table.dtype) != (expected, _rest_bytes(model), dtype):
        raise SparsifyError(f"{path} was measured for another model's shapes or dtype: name another file")
    return table


def measure_costs(
    model: PreTrainedModel,
    rows: PreTrainedModel | None,
    calibration: Calibration,
    *,
    rounds: int = 5,
    progress: Progress | None = None,
) -> CostTable:
    """Measures a dense model, which is converted for it; rows: its dense weights once more, row-major.

    Raises SparsifyError for a model that is not on the CPU or calibration windows too short to decode in.
    """
    if model.device.type != "cpu":
        raise SparsifyError(f"costs are measured with the CPU kernels, and this model is on {model.device}")
    tokens, prompt_tokens = decoding_tokens(calibration)
    fitted = teal_thresholds(model, calibration, _SPARSITIES, skip=prompt_tokens)
    convert(model, Teal(0.5), Calibration(calibration.tokens[:1, :16], calibration.source))
    with prepared(model, rows):
        dense = [side for side in sides_of(model, rows) if side.run_dense]
        own = next(side for side in dense if side.name == "dense")
        settings = _settings(model, fitted)
        sparse = [replace(own, name=name, run_dense=False, thresholds=values) for name, values in settings.items()]
        turns = {side.name: _steps(side, tokens, prompt_tokens) for side in [*dense, *sparse]}
        in_turns(turns, 1)
        with CpuWait() as wait:
            seconds = in_turns(turns, rounds, progress)
        ms = {name: Spread.of([1e3 * s for steps in values for s in steps]).p10 for name, values in seconds.items()}
        kept = {side.name: count(side, tokens, prompt_tokens).step for side in sparse if ":" in side.name}
    shapes = _scaled([_cost(shape, names, ms, kept) for shape, names in _shapes(model).items()], ms[_EVERY] - ms[_NONE])
    found = environment(model.device)
    return CostTable(
        machine=_machine(model),
        versions=found["versions"],
        dtype=str(model.dtype).removeprefix("torch."),
        rest_bytes=rest_bytes(model),
        prompt_tokens=prompt_tokens,
        steps=tokens.shape[1] - prompt_tokens - WARM_UP_STEPS,
        rounds=rounds,
        dense_ms={side.name: ms[side.name] for side in dense},
        rest_ms=ms[_NONE],
        shapes=[asdict(cost) for cost in shapes],
        waited_for_cpu=wait.share,
    )


def decoding_tokens(calibration: Calibration) -> tuple[Tensor, int]:
    """Returns one window [1, S] to decode in and how many of its tokens are the prompt."""
    length = calibration.tokens.shape[1]
    prompt = min(_MOST_PROMPT, length // 2)
    if length < 2 * WARM_UP_STEPS + 4:
        raise SparsifyError(
            f"windows of {length} tokens are too short to measure decoding: --seq-len {2 * WARM_UP_STEPS + 4} or more"
        )
    return calibration.tokens[:1, : prompt + WARM_UP_STEPS + _MOST_STEPS], prompt


def _machine(model: PreTrainedModel) -> dict[str, Any]:
    found = environment(model.device)
    return {name: found[name] for name in _MACHINE}


def _shapes(model: PreTrainedModel) -> dict[tuple[int, int], list[str]]:
    """Returns the names of the linears that are, or would be, converted, by shape [outputs, inputs]."""
    found: dict[tuple[int, int], list[str]] = {}
    shapes = {name: (layer.sparse_out, layer.sparse_in) for name, layer in sparse_layers(model).items()}
    if not shapes:
        targets = find_targets(model, torch.zeros(1, 8, dtype=torch.int64))
        shapes = {name: (shape.outputs, shape.inputs) for name, shape in linear_shapes(model, targets).items()}
    for name, shape in shapes.items():
        found.setdefault(shape, []).append(name)
    return found


def _rest_bytes(model: PreTrainedModel) -> int:
    """Returns the weight bytes of a token outside of the linears that are, or would be, converted."""
    if sparse_layers(model):
        return rest_bytes(model)
    targets = find_targets(model, torch.zeros(1, 8, dtype=torch.int64))
    return rest_bytes(model) - sum(shape.dense_bytes for shape in linear_shapes(model, targets).values())


def _settings(model: PreTrainedModel, fitted: Mapping[float, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Returns thresholds by side: every channel kept, and each shape at each density with all else kept."""
    every = dict.fromkeys(sparse_layers(model), -1.0)
    settings = {_EVERY: every, _NONE: dict.fromkeys(every, float("inf"))}
    for shape, names in _shapes(model).items():
        settings[f"{shape} none"] = every | dict.fromkeys(names, float("inf"))
        for sparsity, thresholds in fitted.items():
            settings[f"{shape}:{sparsity}"] = every | {name: thresholds[name] for name in names}
    return settings


def _steps(side: Side, tokens: Tensor, prompt_tokens: int) -> Callable[[], list[float]]:
    return lambda: decode(side, tokens, prompt_tokens).seconds[WARM_UP_STEPS:]


def _cost(
    shape: tuple[int, int], names: list[str], ms: Mapping[str, float], kept: Mapping[str, Mapping[str, float]]
) -> ShapeCost:
    """Returns a shape's points; a density that came out slower than a larger one is noise, and takes its time."""
    none = ms[f"{shape} none"]
    points = [(0.0, 0.0), (1.0, ms[_EVERY] - none)]
    for sparsity in _SPARSITIES:
        side = f"{shape}:{sparsity}"
        points.append((sum(kept[side][name] for name in names) / len(names), ms[side] - none))
    points.sort()
    rising = np.maximum.accumulate([max(value, 0.0) for _, value in points])
    pairs = [[density, float(value)] for (density, _), value in zip(points, rising, strict=True)]
    return ShapeCost(*shape, len(names), pairs)


def _scaled(costs: list[ShapeCost], total: float) -> list[ShapeCost]:
    """Returns the costs so that all shapes with every channel kept take `total` ms: one by one they do not quite."""
    found = sum(cost.points[-1][1] for cost in costs)
    if total <= 0.0 or found <= 0.0:
        raise SparsifyError(
            "the linears' weights make no difference to the time of a token that could be measured here: the machine "
            "is busy or the model too small; measure again when it is quiet"
        )
    factor = total / found
    return [replace(cost, points=[[density, ms * factor] for density, ms in cost.points]) for cost in costs]
