"""Cuts of ReLUs by what they drop: the largest t for which CETT stays below a value, for each MLP or one for all.

CETT(t) is the mean over tokens of ‖Σ_{i: 0 < a_i ≤ t} h_i·W_down[:, i]‖₂/‖y‖₂ for an MLP with the activations a, the
inputs h of down and the output y without its bias (arXiv 2402.03804, eq. 1, where a neuron's own size is compared; a
cut of the activation can be made before up is read). Two passes over the calibration text after one that counts; the
last t below the value on a grid of 8 in 8.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.calibration import Calibration, Progress, ScoreHistogram, hooked, run_batches
from sparsify.errors import SparsifyError
from sparsify.neuron_cut import Mlp
from sparsify.targets import dense_weight

_GRID = 8


def relu_cuts(
    model: PreTrainedModel,
    mlps: Sequence[Mlp],
    cett: float,
    calibration: Calibration,
    *,
    shared: bool,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Returns a cut by the name of each MLP's down, the same one where `shared`, then for their mean CETT.

    The model's activations are ReLUs. Raises SparsifyError for a CETT outside of [0, 1), for activations that are not
    finite, and for gate and up in one linear, where no cut can be made.
    """
    if not 0.0 <= cett < 1.0:
        raise SparsifyError(f"cett is {cett}: the share of an MLP's output that a cut may drop is in [0, 1)")
    histograms = _count(model, mlps, calibration, progress)
    groups = [tuple(mlps)] if shared else [(mlp,) for mlp in mlps]
    cuts: dict[str, float] = {}
    low = [0.0] * len(groups)
    grids = [_quantiles([histograms[mlp.down] for mlp in group]) for group in groups]
    for _ in range(2):
        tried = {mlp.down: grid for group, grid in zip(groups, grids, strict=True) for mlp in group}
        tails = cett_of_cuts(model, mlps, tried, calibration, progress)
        for index, (group, grid) in enumerate(zip(groups, grids, strict=True)):
            mean = torch.stack([tails[mlp.down] for mlp in group]).mean(dim=0)
            below = [t for t, tail in zip(grid, mean.tolist(), strict=True) if tail <= cett]
            above = [t for t, tail in zip(grid, mean.tolist(), strict=True) if tail > cett]
            low[index] = max([low[index], *below])
            high = min(above, default=low[index])
            step = (high - low[index]) / (_GRID + 1)
            grids[index] = [low[index] + step * (i + 1) for i in range(_GRID)]
    for group, t in zip(groups, low, strict=True):
        cuts |= dict.fromkeys([mlp.down for mlp in group], t)
    return cuts


def cett_of_cuts(
    model: PreTrainedModel,
    mlps: Sequence[Mlp],
    cuts: Mapping[str, Sequence[float]],
    calibration: Calibration,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Returns CETT [K] for the cuts of each MLP, by the name of its down, in fp64; nothing is cut while it runs."""
    weights = {mlp.down: dense_weight(model.get_submodule(mlp.down)).detach().float() for mlp in mlps}
    sums = {mlp.down: torch.zeros(len(cuts[mlp.down]), dtype=torch.float64) for mlp in mlps}
    seen = dict.fromkeys(sums, 0)

    def see(mlp: Mlp, a: Tensor, h: Tensor) -> None:
        size = F.linear(h, weights[mlp.down]).norm(dim=-1, dtype=torch.float64)
        seen[mlp.down] += len(h)
        for index, t in enumerate(cuts[mlp.down]):
            tail = F.linear(torch.where(a <= t, h, 0.0), weights[mlp.down]).norm(dim=-1, dtype=torch.float64)
            sums[mlp.down][index] += torch.where(tail == 0.0, 0.0, tail / size).sum().cpu()

    with _watched(model, mlps, see):
        run_batches(model, calibration.tokens, "cut", progress)
    return {name: total / seen[name] for name, total in sums.items()}


def _count(
    model: PreTrainedModel, mlps: Sequence[Mlp], calibration: Calibration, progress: Progress | None
) -> dict[str, ScoreHistogram]:
    histograms = {mlp.down: ScoreHistogram() for mlp in mlps}
    with _watched(model, mlps, lambda mlp, a, h: histograms[mlp.down].add(a)):
        run_batches(model, calibration.tokens, "calibrate", progress)
    for name, histogram in histograms.items():
        if not histogram.finite:
            raise SparsifyError(
                f"the activations of the MLP of {name} are not finite on the calibration text: check the model in this "
                "dtype, or load it in another (--dtype)"
            )
    return histograms


def _quantiles(histograms: Sequence[ScoreHistogram]) -> list[float]:
    """Returns values that split the activations above 0 into equal shares, ascending."""
    pooled = ScoreHistogram()
    for histogram in histograms:
        pooled.counts += histogram.counts
    total = float(pooled.counts.sum())
    active = 1.0 - float(pooled.counts[0]) / total
    return [pooled.threshold(active * (1.0 - step / _GRID)) for step in range(1, _GRID + 1)]


@contextmanager
def _watched(
    model: PreTrainedModel, mlps: Sequence[Mlp], see: Callable[[Mlp, Tensor, Tensor], object]
) -> Iterator[None]:
    """Inside, see(mlp, activations, inputs of down), [T, F] in fp32, is called in each forward."""
    latest: dict[str, Tensor] = {}
    by_down = {mlp.down: mlp for mlp in mlps}

    def hear(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, y: latest.update({name: y})

    def see_down(name: str, h: Tensor) -> None:
        mlp = by_down[name]
        a = latest.pop(mlp.activation)
        see(mlp, a.flatten(0, -2).float(), h.flatten(0, -2).float())

    handles = [model.get_submodule(m.activation).register_forward_hook(hear(m.activation)) for m in mlps]
    try:
        with hooked({name: model.get_submodule(name) for name in by_down}, see_down):
            yield
    finally:
        for handle in handles:
            handle.remove()
