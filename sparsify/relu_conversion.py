"""The conversion of a model whose MLPs have ReLU: MLPs → cuts → active neurons on calibration text → the rest → swap.

Every linear of the blocks becomes a sparse layer, so that one ledger holds them all. The rows of up and the columns of
down of inactive neurons are not touched (sparsify.relu_layer). The other linears are those of another method; without
one they are kept in full, but for input channels that are 0 already where norms are rectified (stage 2).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify import __version__
from sparsify.activations import zero_up_to
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
from sparsify.norm_targets import find_norms
from sparsify.plugin import attach
from sparsify.rectified import is_rectified
from sparsify.relu_cuts import relu_cuts
from sparsify.relu_layer import is_relu
from sparsify.runtime import sparse_layers
from sparsify.targets import Targets
from sparsify.zeros import NonZero, nonzero_shares


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
    cuts = _cuts(model, method, mlps, calibration, progress)
    shares = active_shares(model, mlps, cuts, calibration, progress)
    fits = [NeuronFit(mlp, shares[mlp.down], cuts[mlp.down]) for mlp in mlps]
    if any(cuts.values()):
        measure_neuron_errors(model, fits, "relu", calibration, progress)
    channels = Channels({}, {}, "uniform", False)
    if rest is not None:
        channels = choose_channels(
            model, rest, calibration, targets, others, allocation=allocation, rotate=rotate, progress=progress
        )
    entries = {name: LinearEntry(0.0, 1.0, 0, False, 1.0, 0.0) for name in shapes}
    entries |= channels.entries() | neuron_entries(shapes, fits, "relu")
    # What is 0 in the input already, of linears that no method settles.
    zeros = _read_shares(model, mlps, targets, () if rest is not None else others, calibration, progress)
    for name, density in zeros.items():
        overhead = shapes[name].overhead_bytes(scaled=False) / shapes[name].dense_bytes
        saved = max(1.0 - density - overhead, 0.0)
        entries[name] = replace(entries[name], sparsity=saved, density=density)
    neurons = NeuronCuts("relu", mlps)
    _swap(model, entries, channels, neurons, cuts, [name for name in zeros if name in others])
    untouched = [name for name in others if rest is None and name not in zeros]
    config = SparsifyConfig(
        sparsify_version=__version__,
        method=method.name,
        method_config=_described(method),
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


def _described(method: Relu) -> dict[str, Any]:
    found = asdict(method) | {"others": None if method.rest is None else options_of(method.rest)}
    # Not named where it is not asked for: an older sparsify does not know it.
    return {key: value for key, value in found.items() if (key, value) != ("cett", None)}


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
    if method.cut == 0.0 and method.cett is None:
        return found
    asked = f"a cut of {method.cut}" if method.cett is None else f"a cut for the CETT {method.cett}"
    fused = next((mlp for mlp in found if mlp.fused), None)
    if fused is not None:
        raise SparsifyError(f"{asked} cannot be made in {fused.up}, which holds gate and up in one: leave the cut out")
    for mlp in found:
        activation = model.get_submodule(mlp.activation)
        if type(activation) is not nn.ReLU:
            raise SparsifyError(
                f"{asked} is for ReLU, and {mlp.activation} is {type(activation).__name__}, which has its own: leave "
                "the cut out"
            )
    return found


def _cuts(
    model: PreTrainedModel, method: Relu, mlps: Sequence[Mlp], calibration: Calibration, progress: Progress | None
) -> dict[str, float]:
    """Returns up to which gate each MLP's neurons are off, by the name of its down, as fp32 holds it."""
    if method.cett is not None:
        found = relu_cuts(model, mlps, method.cett, calibration, shared=False, progress=progress)
    else:
        found = {mlp.down: method.cut or zero_up_to(model.get_submodule(mlp.activation)) for mlp in mlps}
    return {name: float(torch.tensor(cut, dtype=torch.float32)) for name, cut in found.items()}


def _read_shares(
    model: PreTrainedModel,
    mlps: Sequence[Mlp],
    targets: Targets,
    others: Collection[str],
    calibration: Calibration,
    progress: Progress | None,
) -> dict[str, float]:
    """Returns the share of input channels that are not 0, by linear: of those of `others` behind rectified norms, and
    of down where up is rectified, too (dReLU), which has more zeros than its gate.
    """
    behind = {}
    downs = [mlp.down for mlp in mlps if is_rectified(model.get_submodule(mlp.up))]
    if others and any(is_rectified(module) for module in model.modules()):
        norms = find_norms(model, targets, calibration.tokens[:1, :8])
        rectified = [norm for norm in norms if is_rectified(model.get_submodule(norm.name))]
        behind = {norm.linears[0]: [n for n in norm.linears if n in others] for norm in rectified}
    shares = nonzero_shares(model, [*behind, *downs], calibration, progress)
    found = {name: shares[first] for first, names in behind.items() for name in names}
    return found | {name: shares[name] for name in downs}


def refuse_without_rest(alone: bool, allocation: Allocation | str | None, rotate: bool) -> None:
    """Raises SparsifyError for what only another method's linears could take, where there is none."""
    name = getattr(allocation, "name", allocation)
    if alone and (name not in (None, "uniform") or rotate):
        option = "rotate" if rotate else f"allocation {name}"
        raise SparsifyError(f"{option} is for the linears of another method: leave it out, or use relu+teal")


def active_shares(
    model: PreTrainedModel,
    mlps: Sequence[Mlp],
    cuts: Mapping[str, float],
    calibration: Calibration,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Returns the share of each MLP's gates above its cut over all tokens, by the name of its down."""
    counters = {mlp.activation: NonZero(model.device) for mlp in mlps}

    def counting(mlp: Mlp) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        cut = cuts[mlp.down]
        # A NaN is active: what is broken must show.
        return lambda module, args, y: counters[mlp.activation].see(~(args[0].float() <= cut))

    handles = [model.get_submodule(mlp.activation).register_forward_hook(counting(mlp)) for mlp in mlps]
    try:
        run_batches(model, calibration.processes.part(calibration.tokens), "calibrate", progress)
    finally:
        for handle in handles:
            handle.remove()
    return {mlp.down: counters[mlp.activation].share(calibration.processes) for mlp in mlps}


def _swap(
    model: PreTrainedModel,
    entries: Mapping[str, LinearEntry],
    channels: Channels,
    neurons: NeuronCuts,
    cuts: Mapping[str, float],
    zeros: Sequence[str],
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
    for name in zeros:
        layers[name].threshold.fill_(0.0)
    for mlp in neurons.mlps:
        gated = mlp.gate is not None
        # Where there is a gate, the cut is made there, and what it leaves of down's input is not 0. ReLU² and shifted
        # ReLU are 0 where they are off, too.
        cut = cuts[mlp.down] if isinstance(model.get_submodule(mlp.activation), nn.ReLU) else 0.0
        layers[mlp.down].threshold.fill_(0.0 if gated else cut)
        if gated and not mlp.fused:
            layers[mlp.up].threshold.fill_(cuts[mlp.down])


def _in_full(names: list[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{len(names)} linears without ReLU, touched in full: {', '.join(names[:3])}{more}"] if names else []
