"""The story of a conversion: targets → allocate → calibrate → fit → choose → swap.

The allocation says which candidates each linear has: with `uniform`, the method's own at its sparsity. One pass over
the calibration text streams score histograms, from which every candidate gets its threshold; a second pass over a
part of it measures every candidate's output error, and each linear keeps its best.
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
from sparsify.budget import Candidate, LinearShape, Score
from sparsify.calibration import Calibration, Progress, ScoreHistogram, hooked, run_batches
from sparsify.config import CalibrationEntry, LinearEntry, SparsifyConfig
from sparsify.errors import SparsifyError
from sparsify.kernels.reference import keep_mask, scores
from sparsify.linear import SparsitySwitch
from sparsify.methods import Method
from sparsify.models import check_context
from sparsify.plugin import attach
from sparsify.runtime import sparse_layers
from sparsify.targets import Targets, dense_weight, find_targets, linear_shapes
from sparsify.token_cut import TokenCut, counted_scores, cut_mask, fitted_number
from sparsify.token_layer import make_layer
from sparsify.trial import TargetLinear

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
    error: float = 0.0
    tokens: int = 0

    def keep(self, x: Tensor) -> Tensor:
        """Returns the channels that it uses of x [..., I], bool."""
        number = torch.tensor(self.threshold, device=x.device)
        if self.candidate.cut is None:
            return keep_mask(x, number, self.scale)
        return cut_mask(self.candidate.cut, scores(x, self.scale), number)


def convert(
    model: PreTrainedModel,
    method: Method,
    calibration: Calibration,
    *,
    allocation: Allocation | str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Converts the model in place and returns it; its weights are kept, not copied.

    allocation: how the budget is spent over the linears, by name or with its own options (sparsify.allocation); None
    for the method's own, which is uniform for all but auto.

    The linears of its blocks become sparse layers, and model.config.quantization_config a SparsifyConfig.
    Raises SparsifyError for a model that is converted or quantised already, or one whose budget cannot be met.
    """
    refuse_converted(model)
    _check_tokens(model, calibration.tokens)
    targets = find_targets(model, calibration.tokens[:1, :8])
    shapes = linear_shapes(model, targets)
    method = method.bind(shapes)
    linears = _prepare(model, targets, shapes)
    chooser = allocation_of(allocation, method)
    choices = chooser.choices(Problem(model, method, shapes, linears, calibration, progress))
    fits = _fit(model, linears, choices, calibration, progress)
    _measure_errors(model, linears, fits, calibration, progress)
    chosen = {name: min(options, key=lambda fit: fit.error) for name, options in fits.items()}
    _swap(model, linears, chosen)
    _describe(model, method, chooser, calibration, targets, linears, chosen)
    return model


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
    fits: dict[str, list[_Fit]] = {}
    for index, (name, linear) in enumerate(linears.items()):
        _decompose(linear, choices[name])
        fits[name] = [_fit_candidate(name, linear, c, histograms) for c in choices[name]]
        if progress is not None:
            progress("fit", index + 1, len(linears))
    return fits


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
    name: str, linear: TargetLinear, candidate: Candidate, histograms: Mapping[_HistogramKey, ScoreHistogram]
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
    return _Fit(candidate, threshold, linear.scale(candidate), *linear.factors(candidate.rank))


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
            dropped = torch.where(fit.keep(x), 0.0, x).float()
            missing = F.linear(dropped, weight)
            if fit.lr_a is not None and fit.lr_b is not None:
                missing = missing - F.linear(F.linear(dropped, fit.lr_a.float()), fit.lr_b.float())
            fit.error += float((missing.square().sum(-1, dtype=torch.float64) / size).sum())

    step = max(len(calibration.tokens) // _ERROR_WINDOWS, 1)
    with hooked({name: linear.module for name, linear in linears.items()}, see):
        run_batches(model, calibration.tokens[::step][:_ERROR_WINDOWS], "compare", progress)


def _swap(model: PreTrainedModel, linears: Mapping[str, TargetLinear], chosen: Mapping[str, _Fit]) -> None:
    switch = SparsitySwitch()
    for name, linear in linears.items():
        fit = chosen[name]
        c = fit.candidate
        layer = make_layer(linear.module, cut=c.cut, scaled=c.scaled, rank=c.rank, switch=switch)
        layer.threshold.fill_(fit.threshold)
        if layer.scale is not None and fit.scale is not None:
            layer.scale.copy_(fit.scale)
        if fit.lr_a is not None and fit.lr_b is not None and layer.lr_a is not None and layer.lr_b is not None:
            layer.lr_a.copy_(fit.lr_a)
            layer.lr_b.copy_(fit.lr_b)
        model.set_submodule(name, layer)


def _describe(
    model: PreTrainedModel,
    method: Method,
    allocation: Allocation,
    calibration: Calibration,
    targets: Targets,
    linears: Mapping[str, TargetLinear],
    chosen: Mapping[str, _Fit],
) -> None:
    entries = {}
    for name, linear in linears.items():
        c = chosen[name].candidate
        error = chosen[name].error / max(chosen[name].tokens, 1)
        ranks = list(linear.spectrum.energy_ranks()) if linear.spectrum is not None else None
        entries[name] = LinearEntry(c.sparsity, c.rho, c.rank, c.scaled, c.density, error, ranks, c.cut)
    config = SparsifyConfig(
        sparsify_version=__version__,
        method=method.name,
        method_config=asdict(method),
        prefill="sparse",
        sites=[list(site.names) for site in targets.sites],
        left_dense=list(targets.left_dense),
        calibration=CalibrationEntry(**calibration.fingerprint),
        linears=entries,
        allocation=allocation.name,
    )
    attach(model, config)
