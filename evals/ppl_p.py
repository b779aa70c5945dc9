"""PPL-p% sparsity: the share of neurons that can be left out before perplexity rises by p% (arXiv 2411.02335).

Neurons, CETT and what is dropped: sparsify.evals.neurons, cett and neuron_rules. One CETT for all layers is searched
(section 4.2, appendix F) for which perplexity with every weak neuron left out, in every layer and at every token, is
(1 + p) times the dense one: exp(nll_sparse − nll_dense) − 1 in [0.99·p, p], or the last CETT measured below where rises
jump over that. Each layer's threshold meets the CETT within 1%, or is the last below where its curve jumps.
Sparsity is 1 − the mean activation ratio, kept/all neurons, over layers and real tokens, counted in the sparse run.

Several p share the curves and every perplexity. Cost: 3 passes over the CETT text and 1 or 2 for each new range of
CETT, where a pass is a forward without the head and K + 1 products with W_down in every layer; and around 10
perplexities for each p. Nothing is random. Unlike the authors' code: thresholds are not cut to a linear grid, no pad
is in a mean, and exact zeros are dropped. scope linears is ours, and called PPL-p% channel sparsity. Not covered:
experts stored as 3-D tensors; thresholds from activations that are sparse already.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration import Calibration
from sparsify.errors import SparsifyError
from sparsify.evals.cett import CettCurves, Natural, Tail
from sparsify.evals.neuron_rules import Rule, check_rule, make_rule
from sparsify.evals.neurons import Layer, layers_of, watched
from sparsify.evals.perplexity import Perplexity, perplexity
from sparsify.evals.ppl_p_result import LayerPoint, NaturalLayer, Point, PplP
from sparsify.evals.rise_search import RiseSearch
from sparsify.known_thresholds import Known, apply_thresholds
from sparsify.models import check_context
from sparsify.targets import find_targets
from sparsify.text import Windows

Progress = Callable[[str, int, int], None]


def measure_ppl_p(
    model: PreTrainedModel,
    windows: Windows,
    *,
    p: Sequence[float],
    cett_windows: Windows | None = None,
    rules: Sequence[str] = ("cett",),
    scope: str = "mlp",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> PplP:
    """Measures a dense model at every tolerance p (0.01 is 1%) with every rule.

    windows: what perplexity is measured on; cett_windows: what thresholds are fitted on, the same where left out, as
    in the paper. Raises SparsifyError for a p that is not above 0, an unknown rule or scope, and a model without
    neurons that can be found.
    """
    for value in p:
        if not (isinstance(value, int | float) and 0.0 < value < math.inf):
            raise SparsifyError(f"p is {value!r}: the rise in perplexity must be a number above 0, such as 0.01 for 1%")
    for name in rules:
        check_rule(name)
    cett_windows = cett_windows or windows
    check_context(model, cett_windows.seq_len)
    left_out = find_targets(model, windows.tokens[:1, :8]).left_dense
    layers = layers_of(model, scope, windows.tokens[:1, :8])
    runs = _Runs(model, layers, windows, batch_size, progress)
    curves = CettCurves(model, layers, cett_windows, progress)
    chosen = [make_rule(name, curves) for name in rules]
    found: list[tuple[Rule, float | None, float]] = []
    for rule in chosen:
        if rule.most == 0.0:
            found.append((rule, None, 0.0))
            continue
        search = RiseSearch(partial(runs.rise, rule), most=rule.most, step=rule.step)
        for value in sorted(set(p)):
            runs.stage = f"{rule.name}, {100 * value:g}%"
            found.append((rule, value, search.largest(value)))
    tails = _tails(curves, layers, found)
    points = tuple(_point(runs, rule, value, setting, layers, tails) for rule, value, setting in found)
    natural = tuple(_natural(curves.natural[layer.name]) for layer in layers)
    return PplP(scope, runs.dense, points, natural, left_out, curves.passes, runs.count)


def apply_point(model: PreTrainedModel, point: Point, *, scope: str, calibration: Calibration) -> PreTrainedModel:
    """Converts the dense model that a point of rule cett was measured on, in place, to the sparse one it describes.

    The layers of the point become sparse ones with its thresholds, all other linears stay dense. On the reference
    backend the result has the point's perplexity and activation ratios exactly. calibration: the CETT text, for the
    checkpoint's record. Raises SparsifyError for a point of another rule, or one that keeps nothing.
    """
    if point.rule != "cett":
        raise SparsifyError(f"rule {point.rule} has no thresholds for a sparse checkpoint: only cett has")
    known = {}
    for layer in point.layers:
        assert layer.dense_activation_ratio is not None
        assert layer.error is not None
        known[layer.name] = Known(layer.cut, layer.dense_activation_ratio, layer.error)
    options = {"p": point.p, "cett": point.setting, "scope": scope}
    return apply_thresholds(model, known, method="ppl-p", options=options, calibration=calibration)


class _Runs:
    """Perplexities of the model with rules at settings, each measured once, with the shares of neurons kept."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[Layer],
        windows: Windows,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        self._model, self._layers, self._windows = model, layers, windows
        self._batch_size, self._progress = batch_size, progress
        self._measured: dict[tuple[str, float], tuple[Perplexity, dict[str, float]]] = {}
        # What the progress of a run is called.
        self.stage = "dense"
        self.count = 1
        self.dense = perplexity(model, windows, batch_size=batch_size, progress=self._report())

    def rise(self, rule: Rule, setting: float) -> float:
        difference = self.at(rule, setting)[0].nll_per_token - self.dense.nll_per_token
        return math.expm1(difference) if difference < 700 else math.inf

    def at(self, rule: Rule, setting: float) -> tuple[Perplexity, dict[str, float]]:
        """Returns the perplexity and each layer's activation ratio."""
        key = (rule.name, setting)
        if key not in self._measured:
            self._measured[key] = self._run(rule, setting)
        return self._measured[key]

    def _run(self, rule: Rule, setting: float) -> tuple[Perplexity, dict[str, float]]:
        keep = rule.keep(setting)
        kept = {layer.name: torch.zeros((), dtype=torch.int64, device=layer.norms.device) for layer in self._layers}
        seen = dict.fromkeys(kept, 0)

        def see(layer: Layer, h: Tensor, s: Tensor, real: Tensor | None) -> Tensor:
            mask = keep(layer, h, s)
            counted = mask if real is None else mask[real]
            kept[layer.name] += counted.sum()
            seen[layer.name] += counted.numel()
            return mask

        self.count += 1
        with watched(self._model, self._layers, self._windows, see):
            found = perplexity(
                self._model,
                self._windows,
                batch_size=self._batch_size,
                progress=self._report(),
            )
        return found, {name: float(count) / seen[name] for name, count in kept.items()}

    def _report(self) -> Callable[[int, int], None] | None:
        return None if self._progress is None else partial(self._progress, self.stage)


def _tails(
    curves: CettCurves, layers: Sequence[Layer], found: Sequence[tuple[Rule, float | None, float]]
) -> dict[tuple[str, float], Tail]:
    """Measures what the thresholds found really drop, all of them in one pass: by layer and setting."""
    settings = [(rule, setting) for rule, _, setting in found if rule.name == "cett"]
    if not settings:
        return {}
    cuts = {layer.name: [rule.cut(layer, setting) for rule, setting in settings] for layer in layers}
    return {
        (name, setting): Tail(tail.cett[i], tail.error[i], tail.kept[i])
        for name, tail in curves.tails(cuts).items()
        for i, (_, setting) in enumerate(settings)
    }


def _point(
    runs: _Runs,
    rule: Rule,
    p: float | None,
    setting: float,
    layers: Sequence[Layer],
    tails: dict[tuple[str, float], Tail],
) -> Point:
    measured, ratios = runs.at(rule, setting)
    found = []
    for layer in layers:
        point = LayerPoint(layer.name, rule.cut(layer, setting), ratios[layer.name])
        if rule.name == "cett":
            tail = tails[layer.name, setting]
            point = LayerPoint(
                point.name, point.cut, point.activation_ratio, float(tail.cett), float(tail.error), float(tail.kept)
            )
        found.append(point)
    ratio = sum(ratios.values()) / len(ratios)
    rise = runs.rise(rule, setting)
    return Point(
        rule.name, p, setting, measured.perplexity, measured.nll_per_token, rise, ratio, tuple(found)
    )  # fmt: skip


def _natural(found: Natural) -> NaturalLayer:
    return NaturalLayer(
        found.layer.name, found.layer.neurons, found.zero_ratio, found.dead_ratio, found.static_dead
    )  # fmt: skip
