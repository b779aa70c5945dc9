"""The story of a conversion: targets → calibrate → split budgets → fit → choose → swap.

One pass over the calibration text streams score histograms, from which every candidate gets its thresholds; a second
pass over a part of it measures every candidate's output error, and each linear keeps its best.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify import __version__
from sparsify.budget import Candidate, LinearShape, Score
from sparsify.calibration import Calibration, Progress, ScoreHistogram, hooked, run_batches
from sparsify.config import CalibrationEntry, LinearEntry, SparsifyConfig
from sparsify.errors import SparsifyError
from sparsify.kernels.reference import keep_mask
from sparsify.linear import SparsitySwitch, make_sparse
from sparsify.low_rank import LowRank, low_rank
from sparsify.methods import Method
from sparsify.models import check_context
from sparsify.plugin import attach
from sparsify.runtime import sparse_layers
from sparsify.targets import Targets, dense_weight, find_targets, linear_shapes

# Windows of the calibration text on which candidates are compared.
_ERROR_WINDOWS = 8


@dataclass
class _Fit:
    """A candidate of one linear with its tensors, and its error sum while the second pass runs."""

    candidate: Candidate
    threshold: float
    lr_a: Tensor | None
    lr_b: Tensor | None
    error: float = 0.0


@dataclass
class _Linear:
    """One target while it is being converted."""

    module: nn.Module
    site: int
    column_norm: Tensor
    candidates: tuple[Candidate, ...]
    spectrum: LowRank | None = None
    tokens: int = 0

    @property
    def weight(self) -> Tensor:
        return dense_weight(self.module)


def convert(
    model: PreTrainedModel, method: Method, calibration: Calibration, *, progress: Progress | None = None
) -> PreTrainedModel:
    """Converts the model in place and returns it; its weights are kept, not copied.

    The linears of its blocks become sparse layers, and model.config.quantization_config a SparsifyConfig.
    Raises SparsifyError for a model that is converted or quantised already, or one whose budget cannot be met.
    """
    _refuse_converted(model)
    _check_tokens(model, calibration.tokens)
    targets = find_targets(model, calibration.tokens[:1, :8])
    shapes = linear_shapes(model, targets)
    method = method.bind(shapes)
    linears = _prepare(model, method, targets, shapes)
    fits = _fit(model, linears, calibration, progress)
    _measure_errors(model, linears, fits, calibration, progress)
    chosen = {name: min(options, key=lambda fit: fit.error) for name, options in fits.items()}
    _swap(model, linears, chosen)
    _describe(model, method, calibration, targets, linears, chosen)
    return model


def _refuse_converted(model: PreTrainedModel) -> None:
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


def _prepare(
    model: PreTrainedModel, method: Method, targets: Targets, shapes: Mapping[str, LinearShape]
) -> dict[str, _Linear]:
    sites = {name: index for index, site in enumerate(targets.sites) for name in site.names}
    modules = {name: model.get_submodule(name) for name in shapes}
    return {
        name: _Linear(
            module=modules[name],
            site=sites[name],
            column_norm=dense_weight(modules[name]).detach().double().norm(dim=0).float(),
            candidates=method.candidates(name, shape),
        )
        for name, shape in shapes.items()
    }


def _fit(
    model: PreTrainedModel, linears: Mapping[str, _Linear], calibration: Calibration, progress: Progress | None
) -> dict[str, list[_Fit]]:
    histograms = _collect(model, linears, calibration, progress)
    fits: dict[str, list[_Fit]] = {}
    for index, (name, linear) in enumerate(linears.items()):
        top = max(candidate.rank for candidate in linear.candidates)
        linear.spectrum = low_rank(linear.weight, top) if top else None
        fits[name] = [_fit_candidate(name, linear, c, histograms) for c in linear.candidates]
        if progress is not None:
            progress("fit", index + 1, len(linears))
    return fits


def _collect(
    model: PreTrainedModel, linears: Mapping[str, _Linear], calibration: Calibration, progress: Progress | None
) -> dict[tuple[Score, str], ScoreHistogram]:
    """Runs the calibration text once; a site's linears share its histogram of magnitudes."""
    histograms: dict[tuple[Score, str], ScoreHistogram] = {}
    for name, linear in linears.items():
        for candidate in linear.candidates:
            key = _histogram_key(name, linear, candidate.score)
            histograms.setdefault(key, ScoreHistogram())
    first: dict[int, str] = {}
    for name, linear in linears.items():
        first.setdefault(linear.site, name)

    def see(name: str, x: Tensor) -> None:
        linear = linears[name]
        shared = histograms.get(("magnitude", str(linear.site)))
        if shared is not None and first[linear.site] == name:
            shared.add(x)
        own = histograms.get(("column-norm", name))
        if own is not None:
            own.add(x.float().abs() * linear.column_norm)

    with hooked({name: linear.module for name, linear in linears.items()}, see):
        run_batches(model, calibration.tokens, "calibrate", progress)
    return histograms


def _histogram_key(name: str, linear: _Linear, score: Score) -> tuple[Score, str]:
    return (score, str(linear.site) if score == "magnitude" else name)


def _fit_candidate(
    name: str, linear: _Linear, candidate: Candidate, histograms: Mapping[tuple[Score, str], ScoreHistogram]
) -> _Fit:
    histogram = histograms[_histogram_key(name, linear, candidate.score)]
    threshold = histogram.threshold(candidate.density)
    if not histogram.finite:
        raise SparsifyError(
            f"the inputs of {name} are not finite on the calibration text, so no threshold can be fitted: "
            "check the model in this dtype, or load it in another (--dtype)"
        )
    if not candidate.rank or linear.spectrum is None:
        return _Fit(candidate, threshold, None, None)
    lr_a, lr_b = linear.spectrum.truncated(candidate.rank)
    return _Fit(candidate, threshold, lr_a, lr_b)


def _measure_errors(
    model: PreTrainedModel,
    linears: Mapping[str, _Linear],
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
        linear.tokens += len(x)
        for fit in fits[name]:
            threshold = torch.tensor(fit.threshold, device=x.device)
            keep = keep_mask(x, threshold, linear.column_norm if fit.candidate.scaled else None)
            dropped = torch.where(keep, 0.0, x).float()
            missing = F.linear(dropped, weight)
            if fit.lr_a is not None and fit.lr_b is not None:
                missing = missing - F.linear(F.linear(dropped, fit.lr_a.float()), fit.lr_b.float())
            fit.error += float((missing.square().sum(-1, dtype=torch.float64) / size).sum())

    step = max(len(calibration.tokens) // _ERROR_WINDOWS, 1)
    with hooked({name: linear.module for name, linear in linears.items()}, see):
        run_batches(model, calibration.tokens[::step][:_ERROR_WINDOWS], "compare", progress)


def _swap(model: PreTrainedModel, linears: Mapping[str, _Linear], chosen: Mapping[str, _Fit]) -> None:
    switch = SparsitySwitch()
    for name, linear in linears.items():
        fit = chosen[name]
        layer = make_sparse(linear.module, scaled=fit.candidate.scaled, rank=fit.candidate.rank, switch=switch)
        layer.threshold.fill_(fit.threshold)
        if layer.scale is not None:
            layer.scale.copy_(linear.column_norm)
        if fit.lr_a is not None and fit.lr_b is not None and layer.lr_a is not None and layer.lr_b is not None:
            layer.lr_a.copy_(fit.lr_a)
            layer.lr_b.copy_(fit.lr_b)
        model.set_submodule(name, layer)


def _describe(
    model: PreTrainedModel,
    method: Method,
    calibration: Calibration,
    targets: Targets,
    linears: Mapping[str, _Linear],
    chosen: Mapping[str, _Fit],
) -> None:
    entries = {}
    for name, linear in linears.items():
        c = chosen[name].candidate
        error = chosen[name].error / linear.tokens if linear.tokens else 0.0
        ranks = list(linear.spectrum.energy_ranks()) if linear.spectrum is not None else None
        entries[name] = LinearEntry(c.sparsity, c.rho, c.rank, c.scaled, c.density, error, ranks)
    config = SparsifyConfig(
        sparsify_version=__version__,
        method=method.name,
        method_config=asdict(method),
        prefill="sparse",
        sites=[list(site.names) for site in targets.sites],
        left_dense=list(targets.left_dense),
        calibration=CalibrationEntry(**calibration.fingerprint),
        linears=entries,
    )
    attach(model, config)
