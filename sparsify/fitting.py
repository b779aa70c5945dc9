"""Thresholds of candidates from streamed histograms of their scores, and the output errors that compare candidates."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.allocation import Choices
from sparsify.budget import Candidate, Score
from sparsify.calibration import Calibration, Progress, ScoreHistogram, hooked, run_batches
from sparsify.errors import SparsifyError
from sparsify.kernels.reference import keep_mask, scores
from sparsify.processes import WindowSums
from sparsify.rotation import eigenbasis, second_moments
from sparsify.token_cut import TokenCut, counted_scores, cut_mask, fitted_number
from sparsify.token_layer import rotated_part
from sparsify.trial import TargetLinear

# Windows of the calibration text on which candidates are compared.
_ERROR_WINDOWS = 8


@dataclass
class Fit:
    """A candidate of one linear with its tensors, and its error sum after the second pass."""

    candidate: Candidate
    threshold: float
    scale: Tensor | None
    lr_a: Tensor | None
    lr_b: Tensor | None
    rotation: Tensor | None
    error: float = 0.0
    tokens: int = 0
    # c = R·E[dropped] [O].
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


def best(fits: Mapping[str, list[Fit]]) -> dict[str, Fit]:
    """Returns each linear's fit of the least error, the first of equals."""
    return {name: min(options, key=lambda fit: fit.error) for name, options in fits.items()}


def measure_errors(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    fits: Mapping[str, list[Fit]],
    calibration: Calibration,
    progress: Progress | None,
) -> None:
    """Sums ‖ŷ − y‖²/‖y‖² of every candidate over the tokens of some windows, each linear on dense inputs.

    Relative token by token: otherwise the few tokens with huge activations, such as BOS, decide alone.
    """

    sums: WindowSums[tuple[str, int]] = WindowSums(calibration.processes)

    def see(name: str, x: Tensor) -> None:
        linear = linears[name]
        weight = linear.weight.float()
        x = x.reshape(-1, x.shape[-1])
        size = F.linear(x.float(), weight).square().sum(-1, dtype=torch.float64).clamp_min(1e-30)
        for index, fit in enumerate(fits[name]):
            missing = fit.missing(fit.dropped(x), weight)
            if fit.compensation is not None:
                missing = missing - fit.compensation
            error = (missing.square().sum(-1, dtype=torch.float64) / size).sum()
            sums.add((name, index), torch.stack([error, error.new_tensor(len(x))]))

    step = max(len(calibration.tokens) // _ERROR_WINDOWS, 1)
    windows = calibration.processes.part(calibration.tokens[::step][:_ERROR_WINDOWS])
    with hooked({name: linear.module for name, linear in linears.items()}, see):
        run_batches(model, windows, "compare", progress)
    for (name, index), (error, tokens) in sums.totals().items():
        fits[name][index].error += float(error)
        fits[name][index].tokens += int(tokens)


def fit_candidates(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    choices: Choices,
    calibration: Calibration,
    progress: Progress | None,
) -> dict[str, list[Fit]]:
    """Runs the calibration text and returns each linear's candidates, fitted, in their order.

    Raises SparsifyError where a linear's inputs are not finite.
    """
    histograms = _collect(model, linears, choices, calibration, progress)
    rotations = _rotations(model, linears, choices, calibration, progress)
    fits: dict[str, list[Fit]] = {}
    for index, (name, linear) in enumerate(linears.items()):
        linear.decompose(choices[name])
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
            linear.decompose(choices[name])
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
        run_batches(model, calibration.processes.part(calibration.tokens), "calibrate", progress)
    calibration.processes.agree(list(histograms), "candidates")
    for histogram in histograms.values():
        histogram.add_up(calibration.processes)
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
) -> Fit:
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
    return Fit(candidate, threshold, linear.scale(candidate), *linear.factors(candidate.rank), rotation)
