"""A conversion that chooses neurons of MLPs: MLPs → one density of neurons → calibrate → measure → swap.

Every linear of the blocks becomes a sparse layer, so that one ledger holds them all; those that are not cut keep every
channel. Not covered: shares that differ from MLP to MLP.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsify import __version__
from sparsify.allocation import Allocation, allocation_of
from sparsify.budget import LinearShape
from sparsify.calibration import Calibration, Progress, ScoreHistogram, hooked, run_batches
from sparsify.config import CalibrationEntry, LinearEntry, SparsifyConfig
from sparsify.errors import SparsifyError
from sparsify.kernels.reference import keep_mask
from sparsify.linear import SparsitySwitch, make_sparse
from sparsify.methods import NeuronMethod
from sparsify.mlp_layer import place_neuron_layers
from sparsify.mlp_targets import cut_mlps, find_mlps
from sparsify.neuron_budget import neuron_densities
from sparsify.neuron_cut import Mlp, NeuronCut, NeuronCuts
from sparsify.plugin import attach
from sparsify.processes import WindowSums
from sparsify.prompt_choice import squared_shares
from sparsify.runtime import sparse_layers
from sparsify.targets import Targets, dense_weight
from sparsify.token_cut import top_k_mask

# Windows of the calibration text on which the output error is measured.
_ERROR_WINDOWS = 8


@dataclass
class NeuronFit:
    """An MLP's density and its number, t or k, with its error sum while it is measured.

    compensation is W E[dropped h] [O] in fp32, the bias of a down that gives the mean of what is dropped back.
    """

    mlp: Mlp
    density: float
    number: float = -1.0
    error: float = 0.0
    tokens: int = 0
    compensation: Tensor | None = None


def convert_neurons(
    model: PreTrainedModel,
    method: NeuronMethod,
    calibration: Calibration,
    targets: Targets,
    shapes: Mapping[str, LinearShape],
    *,
    allocation: Allocation | str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Converts the model in place and returns it. Raises SparsifyError as sparsify.conversion.convert does."""
    refuse_allocation(allocation, method)
    cut = method.neuron_cut
    fits: list[NeuronFit] = []
    if method.sparsity > 0.0:
        fits = plan_neurons(model, method, targets, shapes, calibration.tokens[:1, :8])
        _fit(model, fits, cut, calibration, progress)
        if getattr(method, "compensate", False):
            _compensate(model, fits, calibration, progress)
        measure_neuron_errors(model, fits, cut, calibration, progress)
    entries = _entries(shapes, fits, cut)
    neurons = NeuronCuts(cut, tuple(fit.mlp for fit in fits)) if fits else None
    _swap(model, shapes, entries, neurons, fits)
    config = SparsifyConfig(
        sparsify_version=__version__,
        method=method.name,
        method_config={key: value for key, value in asdict(method).items() if (key, value) != ("compensate", False)},
        # A prompt that chooses runs dense: nothing else can be asked of it.
        prefill="dense" if cut == "prompt-top-k" and fits else "sparse",
        sites=[list(site.names) for site in targets.sites],
        left_dense=[*targets.left_dense, *_not_cut(entries, method)],
        calibration=CalibrationEntry(**calibration.fingerprint),
        linears=entries,
        neurons=neurons,
    )
    attach(model, config)
    return model


def plan_neurons(
    model: PreTrainedModel, method: NeuronMethod, targets: Targets, shapes: Mapping[str, LinearShape], tokens: Tensor
) -> list[NeuronFit]:
    """Returns the MLPs that the method cuts, with their densities; runs one short forward on tokens [1, S].

    Raises SparsifyError where the model has none, or the budget cannot be met.
    """
    cut = method.neuron_cut
    mlps = cut_mlps(model, find_mlps(model, targets, tokens), cut, method.name)
    mended = bool(getattr(method, "compensate", False))
    densities = neuron_densities(shapes, mlps, cut, sparsity=method.sparsity, method=method.name, compensated=mended)
    return [NeuronFit(mlp, densities[mlp.down]) for mlp in mlps]


def refuse_allocation(asked: Allocation | str | None, method: NeuronMethod) -> None:
    """Raises SparsifyError for another allocation than uniform."""
    name = allocation_of(asked, method).name
    if name != "uniform":
        raise SparsifyError(
            f"allocation {name} moves bytes between linears, and method {method.name} skips the same share of "
            "neurons in every MLP: use allocation uniform, or another method"
        )


def _fit(
    model: PreTrainedModel, fits: list[NeuronFit], cut: NeuronCut, calibration: Calibration, progress: Progress | None
) -> None:
    """Sets k, or t: the quantile of |act(gate x)| on the calibration text, MLP by MLP (arXiv 2404.08763)."""
    if cut == "prompt-top-k":
        for fit in fits:
            fit.number = float(round(fit.density * fit.mlp.neurons))
        return
    histograms = {fit.mlp.activation: ScoreHistogram() for fit in fits}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, y, counted=histogram: counted.add(y))
        for name, histogram in histograms.items()
    ]
    try:
        run_batches(model, calibration.processes.part(calibration.tokens), "calibrate", progress)
    finally:
        for handle in handles:
            handle.remove()
    for histogram in histograms.values():
        histogram.add_up(calibration.processes)
    for fit in fits:
        histogram = histograms[fit.mlp.activation]
        if not histogram.finite:
            raise SparsifyError(
                f"the outputs of {fit.mlp.activation} are not finite on the calibration text, so no threshold can be "
                "fitted: check the model in this dtype, or load it in another (--dtype)"
            )
        fit.number = max(histogram.threshold(fit.density), 0.0)


def _compensate(
    model: PreTrainedModel, fits: Sequence[NeuronFit], calibration: Calibration, progress: Progress | None
) -> None:
    """Sets c = W E[(1−m)⊙h], h the inputs of down, of every MLP: the mean over all tokens, on dense inputs."""
    by_down = {fit.mlp.down: fit for fit in fits}
    sums: WindowSums[str] = WindowSums(calibration.processes)

    def see(name: str, h: Tensor, activated: Tensor) -> None:
        h = h.reshape(-1, h.shape[-1])
        keep = keep_mask(activated.reshape(h.shape), torch.tensor(by_down[name].number, device=h.device))
        sums.add(name, torch.where(keep, 0.0, h.float()).sum(0, dtype=torch.float64))

    with _seen_neurons(model, fits, see):
        run_batches(model, calibration.processes.part(calibration.tokens), "compensate", progress)
    totals = sums.totals()
    for name, fit in by_down.items():
        mean = (totals[name] / calibration.tokens.numel()).float()
        fit.compensation = F.linear(mean, dense_weight(model.get_submodule(name)).detach().float())


@contextmanager
def _seen_neurons(
    model: PreTrainedModel, fits: Sequence[NeuronFit], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside, see(down, its input, its MLP's activated gate) is called in every forward of an MLP."""
    activated: dict[str, Tensor] = {}
    activations = {fit.mlp.down: fit.mlp.activation for fit in fits}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, y, name=name: activated.update({name: y}))
        for name in activations.values()
    ]
    try:
        modules = {name: model.get_submodule(name) for name in activations}
        with hooked(modules, lambda name, h: see(name, h, activated[activations[name]])):
            yield
    finally:
        for handle in handles:
            handle.remove()


def measure_neuron_errors(
    model: PreTrainedModel,
    fits: Sequence[NeuronFit],
    cut: NeuronCut,
    calibration: Calibration,
    progress: Progress | None,
) -> None:
    """Sums ‖ŷ − y‖²/‖y‖² of every MLP's output over the tokens of some windows, on dense inputs.

    Where the prompt chooses, the first half of a window is the prompt and the second half is measured.
    """
    by_down = {fit.mlp.down: fit for fit in fits}
    weights = {name: dense_weight(model.get_submodule(name)) for name in by_down}
    sums: WindowSums[str] = WindowSums(calibration.processes)

    def see(name: str, x: Tensor, activated: Tensor) -> None:
        fit, number = by_down[name], torch.tensor(by_down[name].number, device=x.device)
        h = x.reshape(-1, x.shape[-1])
        if cut != "prompt-top-k":
            keep = keep_mask(activated.reshape(h.shape), number)
        else:
            prompt = (len(h) + 1) // 2
            keep = top_k_mask(squared_shares(h[:prompt]).sum(dim=0), number)
            h = h[prompt:]
        weight = weights[name].float()
        missing = F.linear(torch.where(keep, 0.0, h).float(), weight)
        if fit.compensation is not None:
            missing = missing - fit.compensation
        dropped = missing.square().sum(-1, dtype=torch.float64)
        size = F.linear(h.float(), weight).square().sum(-1, dtype=torch.float64).clamp_min(1e-30)
        error = (dropped / size).sum()
        sums.add(name, torch.stack([error, error.new_tensor(len(h))]))

    step = max(len(calibration.tokens) // _ERROR_WINDOWS, 1)
    windows = calibration.processes.part(calibration.tokens[::step][:_ERROR_WINDOWS])
    with _seen_neurons(model, fits, see):
        run_batches(model, windows, "compare", progress)
    for name, (error, tokens) in sums.totals().items():
        by_down[name].error += float(error)
        by_down[name].tokens += int(tokens)


def _entries(shapes: Mapping[str, LinearShape], fits: list[NeuronFit], cut: NeuronCut) -> dict[str, LinearEntry]:
    """Returns what the configuration says of every linear."""
    entries = {name: LinearEntry(0.0, 1.0, 0, False, 1.0, 0.0) for name in shapes}
    return entries | neuron_entries(shapes, fits, cut)


def neuron_entries(
    shapes: Mapping[str, LinearShape], fits: Sequence[NeuronFit], cut: NeuronCut
) -> dict[str, LinearEntry]:
    """Returns what the configuration says of the linears that are cut; an MLP's error stands at its down."""
    entries = {}
    for fit in fits:
        for name, share in fit.mlp.shares(cut).items():
            density = 1.0 - share * (1.0 - fit.density)
            down = name == fit.mlp.down
            mended = down and fit.compensation is not None
            overhead = shapes[name].overhead_bytes(scaled=False, compensated=mended) / shapes[name].dense_bytes
            error = fit.error / max(fit.tokens, 1) if down else 0.0
            sparsity = max(1.0 - density - overhead, 0.0)
            entries[name] = LinearEntry(sparsity, 1.0, 0, False, density, error, compensated=mended or None)
    return entries


def _not_cut(entries: Mapping[str, LinearEntry], method: NeuronMethod) -> list[str]:
    names = [name for name, entry in entries.items() if entry.density == 1.0]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{len(names)} linears that {method.name} does not cut, touched in full: {', '.join(names[:3])}{more}"]


def _swap(
    model: PreTrainedModel,
    shapes: Mapping[str, LinearShape],
    entries: Mapping[str, LinearEntry],
    neurons: NeuronCuts | None,
    fits: list[NeuronFit],
) -> None:
    switch = SparsitySwitch()
    for name in shapes:
        mended = bool(entries[name].compensated)
        layer = make_sparse(model.get_submodule(name), scaled=False, rank=0, compensated=mended, switch=switch)
        layer.density = entries[name].density
        model.set_submodule(name, layer)
    if neurons is None:
        return
    place_neuron_layers(model, neurons)
    layers = sparse_layers(model)
    for fit in fits:
        if neurons.cut == "prompt-top-k":
            for name in fit.mlp.linears:
                layers[name].threshold.fill_(fit.number)
            continue
        assert fit.mlp.gate is not None
        layers[fit.mlp.gate].threshold.fill_(fit.number)
        down = layers[fit.mlp.down]
        down.threshold.fill_(0.0)
        if down.sparse_bias is not None and fit.compensation is not None:
            # The unfitted layer's is the dense bias, or 0; the sum is rounded once.
            down.sparse_bias.copy_(down.sparse_bias.float() + fit.compensation)
