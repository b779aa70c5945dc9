"""The story of a conversion: targets → allocate → calibrate → fit → choose → swap.

The allocation says which candidates each linear has: with `uniform`, the method's own at its sparsity. One pass over
the calibration text streams score histograms, from which every candidate gets its threshold; where it was asked for,
another one means what candidates drop; a pass over a part of it measures every candidate's output error, and each
linear keeps its best.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsify import __version__
from sparsify.allocation import Allocation, Choices, Problem, allocation_of
from sparsify.budget import Candidate, LinearShape, Score, uncompensated
from sparsify.calibration import Calibration, Progress, ScoreHistogram, hooked, run_batches
from sparsify.compensation import learn_compensation
from sparsify.config import CalibrationEntry, LinearEntry, SparsifyConfig
from sparsify.errors import SparsifyError
from sparsify.kernels.reference import keep_mask, scores
from sparsify.linear import SparsitySwitch
from sparsify.methods import AnyMethod, Method, NeuronMethod
from sparsify.models import check_context
from sparsify.neuron_conversion import convert_neurons
from sparsify.plugin import attach
from sparsify.rotation import eigenbasis, rotation_problem, second_moments
from sparsify.rotation import rotate as rotate_model
from sparsify.runtime import sparse_layers
from sparsify.targets import Targets, dense_weight, find_targets, linear_shapes
from sparsify.token_cut import TokenCut, counted_scores, cut_mask, fitted_number
from sparsify.token_layer import link_rotations, make_layer, rotated_part
from sparsify.trial import TargetLinear, Trial

# Windows of the calibration text on which candidates are compared.
_ERROR_WINDOWS = 8


@dataclass
class _Fit:
    """A candidate of one linear with its tensors, and its error sum while the second pass runs."""

    candidate: Candidate
    threshold: float
    scale: Tensor | None
    lr_a: Tensor | None
    lr_b: Tensor | None
    rotation: Tensor | None
    error: float = 0.0
    tokens: int = 0
    # Sum of what was dropped [I] while the pass for compensation runs, then c = R·E[dropped] [O].
    dropped_sum: Tensor | None = None
    compensation: Tensor | None = None

    def dropped(self, x: Tensor) -> Tensor:
        """Returns the part of x [..., I] that it does not use, in fp32."""
        if self.rotation is not None:
            return (x - rotated_part(x, self.rotation, torch.tensor(self.threshold, device=x.device))).float()
        return torch.where(self.keep(x), 0.0, x).float()

    def missing(self, dropped: Tensor, weight: Tensor) -> Tensor:
        """Returns R·dropped [..., O], R = W − L: what the output lacks; in fp32, as weight [O, I] is."""
        missing = F.linear(dropped, weight)
        if self.lr_a is not None and self.lr_b is not None:
            missing = missing - F.linear(F.linear(dropped, self.lr_a.float()), self.lr_b.float())
        return missing

    def keep(self, x: Tensor) -> Tensor:
        """Returns the channels that it uses of x [..., I], bool."""
        number = torch.tensor(self.threshold, device=x.device)
        if self.candidate.cut is None:
            return keep_mask(x, number, self.scale)
        return cut_mask(self.candidate.cut, scores(x, self.scale), number)


def convert(
    model: PreTrainedModel,
    method: AnyMethod,
    calibration: Calibration,
    *,
    allocation: Allocation | str | None = None,
    rotate: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Converts the model in place and returns it; its weights are kept, not copied.

    allocation: how the budget is spent over the linears, by name or with its own options (sparsify.allocation); None
    for the method's own, which is uniform for all but auto and larosa.
    rotate: turn the model's residual stream first (sparsify.rotation.rotate), whatever the method; its weights change
    then, and not what it computes; a conversion that is refused later leaves it rotated.

    The linears of its blocks become sparse layers, and model.config.quantization_config a SparsifyConfig.
    Raises SparsifyError for a model that is converted or quantised already, or one whose budget cannot be met.
    """
    refuse_converted(model)
    _check_tokens(model, calibration.tokens)
    targets = find_targets(model, calibration.tokens[:1, :8])
    shapes = linear_shapes(model, targets)
    if isinstance(method, NeuronMethod):
        return convert_neurons(model, method, calibration, targets, shapes, allocation=allocation, progress=progress)
    method = method.bind(shapes)
    chooser = allocation_of(allocation, method)
    rotate = rotate or _rotates(model, method)
    if rotate:
        rotate_model(model, calibration, progress=progress)
    linears = _prepare(model, targets, shapes)
    choices = chooser.choices(Problem(model, method, shapes, linears, calibration, progress))
    learns = bool(getattr(method, "learns_compensation", False))
    if learns:
        # Without it, its bytes are channels.
        choices = {name: (*c, *(uncompensated(o, shapes[name]) for o in c)) for name, c in choices.items()}
    fits = _fit(model, linears, choices, calibration, progress)
    if not learns:
        _compensate(model, linears, fits, calibration, progress)
    _measure_errors(model, linears, fits, calibration, progress)
    chosen = _best(fits)
    if learns:
        chosen = _learn(model, linears, fits, calibration, progress)
    _swap(model, linears, chosen)
    _describe(model, method, chooser, calibration, targets, linears, chosen, rotate)
    return model


def _rotates(model: PreTrainedModel, method: Method) -> bool:
    rotation = getattr(method, "rotation", None)
    if rotation == "where-possible":
        return method.sparsity > 0.0 and rotation_problem(model) is None
    return rotation == "model"


def refuse_converted(model: PreTrainedModel) -> None:
    """Raises SparsifyError for a model that is converted or quantised already."""
    if sparse_layers(model):
        raise SparsifyError("this model is converted already: convert the dense model it was made from")
    if getattr(model, "is_quantized", False):
        raise SparsifyError("this model is quantised: sparsify converts models with floating-point weights")


def _check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < rows:
            raise SparsifyError(
                f"the calibration holds token id {token}, outside this model's vocabulary of {rows}: "
                "it was made with another model's tokenizer"
            )
    check_context(model, tokens.shape[1])


def _prepare(model: PreTrainedModel, targets: Targets, shapes: Mapping[str, LinearShape]) -> dict[str, TargetLinear]:
    sites = {name: index for index, site in enumerate(targets.sites) for name in site.names}
    modules = {name: model.get_submodule(name) for name in shapes}
    return {
        name: TargetLinear(
            modules[name], sites[name], dense_weight(modules[name]).detach().double().norm(dim=0).float()
        )
        for name in shapes
    }


def _fit(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    choices: Choices,
    calibration: Calibration,
    progress: Progress | None,
) -> dict[str, list[_Fit]]:
    histograms = _collect(model, linears, choices, calibration, progress)
    rotations = _rotations(model, linears, choices, calibration, progress)
    fits: dict[str, list[_Fit]] = {}
    for index, (name, linear) in enumerate(linears.items()):
        _decompose(linear, choices[name])
        fits[name] = [_fit_candidate(name, linear, c, histograms, rotations.get(linear.site)) for c in choices[name]]
        if progress is not None:
            progress("fit", index + 1, len(linears))
    return fits


def _rotations(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    choices: Choices,
    calibration: Calibration,
    progress: Progress | None,
) -> dict[int, Tensor]:
    """Returns Q [I, I] of every site whose candidates are rotated, in the weights' dtype."""
    first: dict[int, TargetLinear] = {}
    for name, linear in linears.items():
        if any(candidate.rotated for candidate in choices[name]):
            first.setdefault(linear.site, linear)
    if not first:
        return {}
    groups = {f"input site {site}": {"": linear.module} for site, linear in first.items()}
    moments = second_moments(model, groups, calibration, progress=progress)
    return {site: eigenbasis(moments[f"input site {site}"]).to(linear.weight) for site, linear in first.items()}


def _decompose(linear: TargetLinear, candidates: tuple[Candidate, ...]) -> None:
    """Makes the largest rank's factors, of which those of smaller ranks are parts."""
    linear.factors(max(candidate.rank for candidate in candidates))


# A site for magnitudes, which its linears share; a linear for column norms; a linear and a rank for residual norms;
# and what is counted for the candidate's cut.
_HistogramKey = tuple[Score, str, int, TokenCut | None]


def _collect(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    choices: Choices,
    calibration: Calibration,
    progress: Progress | None,
) -> dict[_HistogramKey, ScoreHistogram]:
    """Runs the calibration text once and counts every score that a candidate needs."""
    histograms: dict[_HistogramKey, ScoreHistogram] = {}
    scales: dict[str, dict[_HistogramKey, Tensor | None]] = {name: {} for name in linears}
    for name, linear in linears.items():
        if any(candidate.score == "residual-norm" for candidate in choices[name]):
            _decompose(linear, choices[name])
        for candidate in choices[name]:
            key = _histogram_key(name, linear, candidate)
            if key not in histograms:
                histograms[key] = ScoreHistogram()
                scales[name][key] = linear.scale(candidate)

    def see(name: str, x: Tensor) -> None:
        for key, scale in scales[name].items():
            cut = key[-1]
            score = scores(x, scale)
            histograms[key].add(score if cut is None else counted_scores(cut, score))

    with hooked({name: linear.module for name, linear in linears.items()}, see):
        run_batches(model, calibration.tokens, "calibrate", progress)
    return histograms


def _histogram_key(name: str, linear: TargetLinear, candidate: Candidate) -> _HistogramKey:
    if candidate.score == "magnitude":
        return (candidate.score, str(linear.site), 0, candidate.cut)
    return (candidate.score, name, candidate.rank if candidate.score == "residual-norm" else 0, candidate.cut)


def _fit_candidate(
    name: str,
    linear: TargetLinear,
    candidate: Candidate,
    histograms: Mapping[_HistogramKey, ScoreHistogram],
    rotation: Tensor | None,
) -> _Fit:
    histogram = histograms[_histogram_key(name, linear, candidate)]
    if not histogram.finite:
        raise SparsifyError(
            f"the inputs of {name} are not finite on the calibration text, so no threshold can be fitted: "
            "check the model in this dtype, or load it in another (--dtype)"
        )
    threshold = histogram.threshold(candidate.density)
    if candidate.cut is not None:
        inputs = linear.weight.shape[1]
        threshold = fitted_number(candidate.cut, threshold, density=candidate.density, inputs=inputs)
    rotation = rotation if candidate.rotated else None
    return _Fit(candidate, threshold, linear.scale(candidate), *linear.factors(candidate.rank), rotation)


def _compensate(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    fits: Mapping[str, list[_Fit]],
    calibration: Calibration,
    progress: Progress | None,
) -> None:
    """Runs the calibration text once more and sets c = R·E[(1−m)⊙x] of the candidates that give it back as a bias.

    The mean is over all tokens, on dense inputs, as thresholds are; R = W − L.
    """
    mended = {name: [fit for fit in options if fit.candidate.compensated] for name, options in fits.items()}
    modules = {name: linears[name].module for name, options in mended.items() if options}
    if not modules:
        return

    def see(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        for fit in mended[name]:
            total = fit.dropped(x).sum(0, dtype=torch.float64)
            fit.dropped_sum = total if fit.dropped_sum is None else fit.dropped_sum + total
            fit.tokens += len(x)

    with hooked(modules, see):
        run_batches(model, calibration.tokens, "compensate", progress)
    for name in modules:
        for fit in mended[name]:
            if fit.dropped_sum is not None:
                mean = (fit.dropped_sum / fit.tokens).float()
                fit.compensation = fit.missing(mean, linears[name].weight.detach().float())
            fit.dropped_sum, fit.tokens = None, 0


def _best(fits: Mapping[str, list[_Fit]]) -> dict[str, _Fit]:
    return {name: min(options, key=lambda fit: fit.error) for name, options in fits.items()}


def _those(fits: Mapping[str, list[_Fit]], *, compensated: bool) -> dict[str, list[_Fit]]:
    return {n: [fit for fit in options if fit.candidate.compensated == compensated] for n, options in fits.items()}


def _learn(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    fits: Mapping[str, list[_Fit]],
    calibration: Calibration,
    progress: Progress | None,
) -> dict[str, _Fit]:
    """Learns the compensation of the best fits that have one; returns them, or the best others where it is no help."""
    mended = _best(_those(fits, compensated=True))
    trial = Trial(model, linears)
    trial.place({name: fit.candidate for name, fit in mended.items()})
    for name, fit in mended.items():
        trial.placed[name].threshold = fit.threshold
    learned = learn_compensation(trial, calibration, progress)
    if not learned.compensation:
        return _best(
            {name: [fit for fit in options if not fit.candidate.compensated] for name, options in fits.items()}
        )
    for name, fit in mended.items():
        fit.compensation = learned.compensation[name]
        fit.error, fit.tokens = 0.0, 0
    _measure_errors(model, linears, {name: [fit] for name, fit in mended.items()}, calibration, None)
    return mended


def _measure_errors(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    fits: Mapping[str, list[_Fit]],
    calibration: Calibration,
    progress: Progress | None,
) -> None:
    """Sums ‖ŷ − y‖²/‖y‖² of every candidate over the tokens of some windows, each linear on dense inputs.

    Relative token by token: otherwise the few tokens with huge activations, such as BOS, decide alone.
    """

    def see(name: str, x: Tensor) -> None:
        linear = linears[name]
        weight = linear.weight.float()
        x = x.reshape(-1, x.shape[-1])
        size = F.linear(x.float(), weight).square().sum(-1, dtype=torch.float64).clamp_min(1e-30)
        for fit in fits[name]:
            fit.tokens += len(x)
            missing = fit.missing(fit.dropped(x), weight)
            if fit.compensation is not None:
                missing = missing - fit.compensation
            fit.error += float((missing.square().sum(-1, dtype=torch.float64) / size).sum())

    step = max(len(calibration.tokens) // _ERROR_WINDOWS, 1)
    with hooked({name: linear.module for name, linear in linears.items()}, see):
        run_batches(model, calibration.tokens[::step][:_ERROR_WINDOWS], "compare", progress)


def _swap(model: PreTrainedModel, linears: Mapping[str, TargetLinear], chosen: Mapping[str, _Fit]) -> None:
    switch = SparsitySwitch()
    for name, linear in linears.items():
        fit = chosen[name]
        c = fit.candidate
        layer = make_layer(
            linear.module,
            cut=c.cut,
            scaled=c.scaled,
            rank=c.rank,
            compensated=c.compensated,
            rotated=c.rotated,
            switch=switch,
        )
        layer.threshold.fill_(fit.threshold)
        if layer.scale is not None and fit.scale is not None:
            layer.scale.copy_(fit.scale)
        if fit.lr_a is not None and fit.lr_b is not None and layer.lr_a is not None and layer.lr_b is not None:
            layer.lr_a.copy_(fit.lr_a)
            layer.lr_b.copy_(fit.lr_b)
        if layer.sparse_bias is not None and fit.compensation is not None:
            # The unfitted layer's is the dense bias, or 0; the sum is rounded once.
            layer.sparse_bias.copy_(layer.sparse_bias.float() + fit.compensation)
        model.set_submodule(name, layer)
    layers, owners = sparse_layers(model), _owners(linears, chosen)
    link_rotations(layers, owners)
    for name in owners.values():
        rotation = chosen[name].rotation
        assert rotation is not None
        layers[name].get_buffer("rotation").copy_(rotation)


def _owners(linears: Mapping[str, TargetLinear], chosen: Mapping[str, _Fit]) -> dict[str, str]:
    """Returns {rotated linear: the first of its site, which stores the rotation}."""
    first: dict[int, str] = {}
    turned = [name for name in linears if chosen[name].rotation is not None]
    return {name: first.setdefault(linears[name].site, name) for name in turned}


def _describe(
    model: PreTrainedModel,
    method: Method,
    allocation: Allocation,
    calibration: Calibration,
    targets: Targets,
    linears: Mapping[str, TargetLinear],
    chosen: Mapping[str, _Fit],
    rotated: bool,
) -> None:
    entries, owners = {}, _owners(linears, chosen)
    for name, linear in linears.items():
        c = chosen[name].candidate
        error = chosen[name].error / max(chosen[name].tokens, 1)
        ranks = list(linear.spectrum.energy_ranks()) if linear.spectrum is not None else None
        entries[name] = LinearEntry(
            c.sparsity, c.rho, c.rank, c.scaled, c.density, error, ranks, c.cut, c.compensated or None, owners.get(name)
        )
    config = SparsifyConfig(
        sparsify_version=__version__,
        method=method.name,
        # Not named where it is off: an older sparsify's methods do not know it.
        method_config={key: value for key, value in asdict(method).items() if (key, value) != ("compensate", False)},
        prefill="sparse",
        sites=[list(site.names) for site in targets.sites],
        left_dense=list(targets.left_dense),
        calibration=CalibrationEntry(**calibration.fingerprint),
        linears=entries,
        allocation=allocation.name,
        rotated=rotated,
    )
    attach(model, config)
