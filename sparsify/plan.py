"""What a conversion would do, from shapes alone: which linears, how each may spend its bytes, what the files will hold.

The checks are those of the conversion itself, on a model that may be on the meta device. Where calibration text chooses
between candidates, or an allocation moves bytes between linears, sizes are bounds; where it does not, they are exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.allocation import Allocation, Problem, allocation_of, refuse_recipe, refuse_token_cuts
from sparsify.budget import SCALE_BYTES, THRESHOLD_BYTES, Candidate, LinearShape
from sparsify.calibration import Calibration
from sparsify.channel_conversion import rotates
from sparsify.compensation import with_uncompensated
from sparsify.errors import SparsifyError
from sparsify.methods import AnyMethod, Method, NeuronMethod
from sparsify.methods.relu import Relu
from sparsify.neuron_conversion import plan_neurons, refuse_allocation
from sparsify.relu_conversion import find_relu_mlps, refuse_without_rest
from sparsify.rotation import refuse_unrotatable
from sparsify.skeleton import stored_dense_bytes
from sparsify.targets import Targets, find_targets, linear_shapes

Options = dict[str, tuple[Candidate, ...]]


@dataclass(frozen=True)
class Range:
    """Bytes, at least and at most; the same where they are known."""

    least: int = 0
    most: int = 0

    def __add__(self, other: "Range") -> "Range":
        return Range(self.least + other.least, self.most + other.most)


@dataclass(frozen=True)
class ConversionPlan:
    """What would be converted and written.

    shapes: of every linear that becomes a sparse layer, in module order; options: the ways that are open to those whose
    channels are cut, at uniform shares where an allocation still moves them; settled: whether they are what the
    conversion will fit; added: bytes of the tensors that are added, by kind; dense_bytes: of the dense model's own,
    as they are written; rotated: whether the model is rotated before.
    """

    targets: Targets
    shapes: Mapping[str, LinearShape]
    options: Options
    settled: bool
    allocation: str
    rotated: bool
    added: Mapping[str, Range]
    dense_bytes: int
    left_dense: tuple[str, ...]
    cut_mlps: int = 0

    @property
    def added_bytes(self) -> Range:
        return sum(self.added.values(), Range())

    @property
    def weight_bytes(self) -> Range:
        """Bytes of all tensors of the checkpoint."""
        return self.added_bytes + Range(self.dense_bytes, self.dense_bytes)


def plan_conversion(
    model: PreTrainedModel,
    method: AnyMethod,
    *,
    allocation: Allocation | str | None = None,
    rotate: bool = False,
) -> ConversionPlan:
    """Returns what convert would do to the model, which may be on the meta device; nothing is changed.

    Raises SparsifyError as convert does for what can be known without weights and text.
    """
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    targets = find_targets(model, tokens)
    shapes = linear_shapes(model, targets)
    dense = stored_dense_bytes(model)
    if isinstance(method, Relu):
        return _plan_relu(model, method, targets, shapes, tokens, allocation, rotate)
    if isinstance(method, NeuronMethod):
        refuse_allocation(allocation, method)
        cut = plan_neurons(model, method, targets, shapes, tokens) if method.sparsity > 0.0 else []
        return ConversionPlan(
            targets, shapes, {}, True, "uniform", False, _thresholds(shapes), dense, targets.left_dense, len(cut)
        )
    return plan_channels(model, method, targets, shapes, allocation=allocation, rotate=rotate)


def plan_scaled(model: PreTrainedModel, names: Sequence[str]) -> ConversionPlan:
    """Returns the plan of a conversion that gives the named linears a threshold and scales, and leaves the others."""
    targets = find_targets(model, torch.zeros(1, 8, dtype=torch.int64))
    every = linear_shapes(model, targets)
    shapes = {name: shape for name, shape in every.items() if name in set(names)}
    scales = SCALE_BYTES * sum(shape.inputs for shape in shapes.values())
    added = _thresholds(shapes) | {"scale": Range(scales, scales)}
    others = f"{len(every) - len(shapes)} linears that no threshold was measured for"
    left = (*targets.left_dense, *([others] if len(every) > len(shapes) else []))
    return ConversionPlan(targets, shapes, {}, True, "uniform", False, added, stored_dense_bytes(model), left)


def plan_dense(model: PreTrainedModel) -> ConversionPlan:
    """Returns the plan of a checkpoint without sparse layers."""
    targets = find_targets(model, torch.zeros(1, 8, dtype=torch.int64))
    return ConversionPlan(targets, {}, {}, True, "uniform", False, {}, stored_dense_bytes(model), targets.left_dense)


def plan_channels(
    model: PreTrainedModel,
    method: Method,
    targets: Targets,
    shapes: Mapping[str, LinearShape],
    *,
    allocation: Allocation | str | None,
    rotate: bool,
) -> ConversionPlan:
    """Returns the plan for the linears of `shapes`, whose channels are cut. Raises as choose_channels does."""
    method = method.bind(shapes)
    chooser = allocation_of(allocation, method)
    if rotate or getattr(method, "rotation", None) == "model":
        refuse_unrotatable(model)
    rotated = rotate or rotates(model, method)
    options, settled = _options(model, method, chooser, shapes)
    if getattr(method, "learns_compensation", False):
        options = with_uncompensated(options, shapes)
    added = _added(options, shapes, targets)
    if not settled:
        added = _moved(added, method, chooser, shapes)
    dense = stored_dense_bytes(model) + (_tied_head_bytes(model) if rotated else 0)
    return ConversionPlan(targets, shapes, options, settled, chooser.name, rotated, added, dense, targets.left_dense)


def _options(
    model: PreTrainedModel, method: Method, chooser: Allocation, shapes: Mapping[str, LinearShape]
) -> tuple[Options, bool]:
    """Returns each linear's candidates, and whether the allocation leaves it at that."""
    nothing = Calibration(torch.zeros(1, 1, dtype=torch.int64), "none")
    problem = Problem(model, method, shapes, {}, nothing)
    if chooser.needs == "shapes":
        return chooser.choices(problem), True
    refuse_recipe(chooser.name, problem)
    refuse_token_cuts(chooser.name, problem)
    most = getattr(chooser, "most", 1.0)
    if method.sparsity > most:
        raise SparsifyError(
            f"sparsity {method.sparsity} is above {most}, the most that allocation {chooser.name} gives a linear"
        )
    problem.least_shares()
    return {name: problem.offers(name, 1.0 - method.sparsity) for name in shapes}, method.sparsity == 0.0


def added_tensors(shape: LinearShape, candidate: Candidate, *, stores_rotation: bool = False) -> dict[str, int]:
    """Returns the bytes of each tensor that a sparse layer with this candidate has besides the dense model's."""
    size = shape.element_size
    tensors = {
        "threshold": THRESHOLD_BYTES,
        "scale": SCALE_BYTES * shape.inputs * candidate.scaled,
        "lr_a": candidate.rank * shape.inputs * size,
        "lr_b": candidate.rank * shape.outputs * size,
        "sparse_bias": shape.outputs * size * candidate.compensated,
        "rotation": shape.inputs * shape.inputs * size * stores_rotation,
    }
    return {name: size for name, size in tensors.items() if size}


def _added(options: Options, shapes: Mapping[str, LinearShape], targets: Targets) -> dict[str, Range]:
    sites = {name: site.names for site in targets.sites for name in site.names}
    stored: set[tuple[str, ...]] = set()
    total: dict[str, Range] = {}
    for name, candidates in options.items():
        # Of a site that is rotated, the first linear stores Q.
        owns = any(c.rotated for c in candidates) and sites[name] not in stored
        if owns:
            stored.add(sites[name])
        ways = [added_tensors(shapes[name], c, stores_rotation=owns) for c in candidates]
        least, most = min(ways, key=lambda way: sum(way.values())), max(ways, key=lambda way: sum(way.values()))
        for kind in dict.fromkeys((*least, *most)):
            total[kind] = total.get(kind, Range()) + Range(least.get(kind, 0), most.get(kind, 0))
    return total


def _moved(
    added: Mapping[str, Range], method: Method, chooser: Allocation, shapes: Mapping[str, LinearShape]
) -> dict[str, Range]:
    """Returns the bounds where shares move between linears: one at share 1 is dense, ranks follow the shares.

    A linear's rank bytes are its share of (1 − rho) of its dense bytes up to two ranks, and shares cost the budget.
    """
    moved = {kind: Range(0, bytes.most) for kind, bytes in added.items()}
    moved["threshold"] = Range(added["threshold"].least, added["threshold"].most)
    rho = getattr(method, "rho", None)
    for kind in ("lr_a", "lr_b"):
        if kind not in added:
            continue
        sides = {n: (s.inputs if kind == "lr_a" else s.outputs) * s.element_size for n, s in shapes.items()}
        most = added[kind].most + 2 * sum(sides.values())
        if chooser.name == "evolutionary" and rho == "auto":
            # It searches rho itself, down to 0.
            full: Any = replace(method, **{"rho": 0.0})
            ranks = {n: max(c.rank for c in full.candidates(n, s)) for n, s in shapes.items()}
            most = sum((ranks[n] + 2) * side for n, side in sides.items())
        moved[kind] = Range(0, most)
    return moved


def _plan_relu(
    model: PreTrainedModel,
    method: Relu,
    targets: Targets,
    shapes: Mapping[str, LinearShape],
    tokens: Tensor,
    allocation: Allocation | str | None,
    rotate: bool,
) -> ConversionPlan:
    mlps = find_relu_mlps(model, method, targets, tokens)
    settled = {name for mlp in mlps for name in mlp.shares("relu")}
    refuse_without_rest(method.rest is None, allocation, rotate)
    if method.rest is None:
        dense = stored_dense_bytes(model)
        added = _thresholds(shapes)
        return ConversionPlan(targets, shapes, {}, True, "uniform", False, added, dense, targets.left_dense, len(mlps))
    others = {name: shape for name, shape in shapes.items() if name not in settled}
    plan = plan_channels(model, method.rest, targets, others, allocation=allocation, rotate=rotate)
    own = _thresholds({name: shapes[name] for name in shapes if name in settled})
    added = {kind: plan.added.get(kind, Range()) + own.get(kind, Range()) for kind in {**plan.added, **own}}
    return replace(plan, shapes=shapes, added=added, cut_mlps=len(mlps))


def _thresholds(shapes: Mapping[str, LinearShape]) -> dict[str, Range]:
    size = THRESHOLD_BYTES * len(shapes)
    return {"threshold": Range(size, size)}


def _tied_head_bytes(model: PreTrainedModel) -> int:
    """Returns what a rotation adds where the head is the embedding: they are two tensors then."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return int(head.weight.nbytes) if head is not None and head.weight is embedding.weight else 0
