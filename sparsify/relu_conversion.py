"""The conversion of a model whose MLPs have ReLU: MLPs → active neurons on calibration text → the rest → swap.

Every linear of the blocks becomes a sparse layer, so that one ledger holds them all. The rows of up and the columns of
down of inactive neurons are not touched (sparsify.relu_layer); the other linears are those of another method, or kept
in full.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify import __version__
from sparsify.allocation import Allocation
from sparsify.budget import LinearShape
from sparsify.calibration import Calibration, Progress, run_batches
from sparsify.channel_conversion import Channels, choose_channels, swap_channels
from sparsify.config import CalibrationEntry, LinearEntry, SparsifyConfig
from sparsify.errors import SparsifyError
from sparsify.linear import SparsitySwitch, make_sparse
from sparsify.methods import options_of
from sparsify.methods.relu import Relu
from sparsify.mlp_layer import place_neuron_layers
from sparsify.mlp_targets import find_mlps
from sparsify.neuron_conversion import NeuronFit, measure_neuron_errors, neuron_entries
from sparsify.neuron_cut import Mlp, NeuronCuts
from sparsify.plugin import attach
from sparsify.processes import Processes
from sparsify.relu_layer import is_relu
from sparsify.runtime import sparse_layers
from sparsify.targets import Targets


def convert_relu(
    model: PreTrainedModel,
    method: Relu,
    calibration: Calibration,
    targets: Targets,
    shapes: Mapping[str, LinearShape],
    *,
    allocation: Allocation | str | None = None,
    rotate: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Converts the model in place and returns it. Raises SparsifyError as sparsify.conversion.convert does."""
    mlps = find_relu_mlps(model, method, targets, calibration.tokens)
    settled = {name for mlp in mlps for name in mlp.shares("relu")}
    others = {name: shape for name, shape in shapes.items() if name not in settled}
    rest = method.rest
    refuse_without_rest(rest is None, allocation, rotate)
    shares = active_shares(model, mlps, method.cut, calibration, progress)
    fits = [NeuronFit(mlp, shares[mlp.down], method.cut) for mlp in mlps]
    if method.cut > 0.0:
        measure_neuron_errors(model, fits, "relu", calibration, progress)
    channels = Channels({}, {}, "uniform", False)
    if rest is not None:
        channels = choose_channels(
            model, rest, calibration, targets, others, allocation=allocation, rotate=rotate, progress=progress
        )
    entries = {name: LinearEntry(0.0, 1.0, 0, False, 1.0, 0.0) for name in shapes}
    entries |= channels.entries() | neuron_entries(shapes, fits, "relu")
    neurons = NeuronCuts("relu", mlps)
    _swap(model, entries, channels, neurons, method.cut)
    untouched = [name for name in others if rest is None]
    config = SparsifyConfig(
        sparsify_version=__version__,
        method=method.name,
        method_config=asdict(method) | {"others": None if rest is None else options_of(rest)},
        prefill="sparse",
        sites=[list(site.names) for site in targets.sites],
        left_dense=[*targets.left_dense, *_in_full(untouched)],
        calibration=CalibrationEntry(**calibration.fingerprint),
        linears={name: entries[name] for name in shapes},
        allocation=channels.allocation,
        neurons=neurons,
        rotated=channels.rotated,
    )
    attach(model, config)
    return model


def find_relu_mlps(model: PreTrainedModel, method: Relu, targets: Targets, tokens: Tensor) -> tuple[Mlp, ...]:
    """Returns the MLPs with ReLU; runs one short forward on tokens [N, S].

    Raises SparsifyError where there is none, or a cut cannot be made in one.
    """
    mlps = find_mlps(model, targets, tokens[:1, :8])
    found = tuple(mlp for mlp in mlps if is_relu(model.get_submodule(mlp.activation)))
    if not found:
        names = {type(model.get_submodule(mlp.activation)).__name__ for mlp in mlps}
        has = f"its MLPs have {', '.join(sorted(names))}" if names else "it has no MLP of linears that can be converted"
        raise SparsifyError(
            f"method relu needs MLPs with ReLU, and no block of {type(model).__name__} has one: {has}; swap the "
            "activation with --method relufy, or use method teal"
        )
    fused = next((mlp for mlp in found if mlp.fused), None)
    if fused is not None and method.cut > 0.0:
        raise SparsifyError(
            f"a cut of {method.cut} cannot be made in {fused.up}, which holds gate and up in one: leave the cut out"
        )
    return found


def refuse_without_rest(alone: bool, allocation: Allocation | str | None, rotate: bool) -> None:
    """Raises SparsifyError for what only another method's linears could take, where there is none."""
    name = getattr(allocation, "name", allocation)
    if alone and (name not in (None, "uniform") or rotate):
        option = "rotate" if rotate else f"allocation {name}"
        raise SparsifyError(f"{option} is for the linears of another method: leave it out, or use relu+teal")


def active_shares(
    model: PreTrainedModel, mlps: Sequence[Mlp], cut: float, calibration: Calibration, progress: Progress | None = None
) -> dict[str, float]:
    """Returns the share of each MLP's activations above the cut over all tokens, by the name of its down."""
    counters = {mlp.activation: _ActiveCount(cut, model.device) for mlp in mlps}
    handles = [model.get_submodule(name).register_forward_hook(counter.see) for name, counter in counters.items()]
    try:
        run_batches(model, calibration.processes.part(calibration.tokens), "calibrate", progress)
    finally:
        for handle in handles:
            handle.remove()
    return {mlp.down: counters[mlp.activation].share(calibration.processes) for mlp in mlps}


class _ActiveCount:
    """A forward hook that counts the outputs of an activation that are above a cut."""

    def __init__(self, cut: float, device: torch.device) -> None:
        self._cut = cut
        # Above the cut, and all.
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    def see(self, module: nn.Module, args: object, y: Tensor) -> None:
        self._counts[0] += (~(y.float() <= self._cut)).sum()
        self._counts[1] += y.numel()

    def share(self, processes: Processes) -> float:
        active, seen = processes.total(self._counts).tolist()
        return int(active) / int(seen)


def _swap(
    model: PreTrainedModel, entries: Mapping[str, LinearEntry], channels: Channels, neurons: NeuronCuts, cut: float
) -> None:
    switch = SparsitySwitch()
    swap_channels(model, channels, switch)
    for name, entry in entries.items():
        if name not in channels.linears:
            layer = make_sparse(model.get_submodule(name), scaled=False, rank=0, switch=switch)
            layer.density = entry.density
            model.set_submodule(name, layer)
    place_neuron_layers(model, neurons)
    layers = sparse_layers(model)
    for mlp in neurons.mlps:
        gated = mlp.gate is not None
        # Where there is a gate, the cut is made there, and what it leaves of down's input is not 0.
        layers[mlp.down].threshold.fill_(0.0 if gated else cut)
        if gated and not mlp.fused:
            layers[mlp.up].threshold.fill_(cut)


def _in_full(names: list[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{len(names)} linears without ReLU, touched in full: {', '.join(names[:3])}{more}"] if names else []
