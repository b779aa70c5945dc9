"""CETT, the cumulative error of tail truncation, of every layer as a function of its threshold (arXiv 2411.02335).

Eq. 3, for one token: CETT = ‖Σ_{i∈D} n_i‖₂ / ‖FFN(x)‖₂ with D = {i : ‖n_i‖₂ ≤ ε} and ‖n_i‖₂ = |h_i|·‖W_down[:, i]‖₂. A
layer's CETT is the mean over real tokens, as in the authors' code. FFN(x) is Σ n_i, without the down projection's bias
(eq. 2). A token whose FFN(x) and tail are both 0 counts as 0. Where the paper writes <, we cut at ≤, so that a
threshold of 0 drops exact zeros; it is what sparse layers do.

‖Σ n_i‖ does not add up over neurons, so it is measured, never derived from stored activations: one pass over the text
evaluates K thresholds in every layer at once. Activations are the dense model's in every layer: the drift by what
earlier layers drop is not in the CETT; it is in the perplexity.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration import ScoreHistogram, run_batches
from sparsify.errors import SparsifyError
from sparsify.evals.neurons import Layer, real_tokens, watched
from sparsify.kernels.reference import scores
from sparsify.targets import dense_weight
from sparsify.text import Windows

Progress = Callable[[str, int, int], None]

# Thresholds of a layer in one pass.
GRID = 16
# Between two measured CETTs of this ratio or less, a threshold is interpolated: CETT is nearly a power of it.
BRACKET = 1.1
# Passes for one CETT, where it is a step that no threshold meets, and the ratio of thresholds that counts as none.
_MOST_PASSES, _SAME = 12, 1.0 + 1e-4
# Elements of the activations that are looked at together.
_CHUNK = 1 << 24
# Shares of a layer's nonzero neurons that the first grid's thresholds drop.
_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.94, 0.97, 0.985, 0.995)


@dataclass
class Natural:
    """What a layer of the dense model leaves at zero by itself, over the real tokens of a text.

    zeros: inputs h that are 0; dead: activations s that are 0, both of tokens · neurons; alive: neurons [I] whose s
    was not 0 at least once; largest: the largest ‖n_i‖.
    """

    layer: Layer
    tokens: int = 0
    zeros: int = 0
    dead: int = 0
    largest: float = 0.0
    largest_activation: float = 0.0
    alive: Tensor = field(init=False)
    histogram: ScoreHistogram = field(default_factory=ScoreHistogram)

    def __post_init__(self) -> None:
        self.alive = torch.zeros(self.layer.neurons, dtype=torch.bool, device=self.layer.norms.device)

    def add(self, h: Tensor, s: Tensor) -> None:
        score = scores(h, self.layer.norms)
        self.tokens += len(h)
        self.zeros += int((h == 0).sum())
        self.dead += int((s == 0).sum())
        self.alive |= (s != 0).any(0)
        self.largest = max(self.largest, float(score.max()))
        self.largest_activation = max(self.largest_activation, float(s.abs().max()))
        self.histogram.add(score)

    @property
    def zero_ratio(self) -> float:
        return self.zeros / (self.tokens * self.layer.neurons)

    @property
    def dead_ratio(self) -> float:
        """The dynamic dead neuron rate: the mean over tokens of neurons whose activation is 0."""
        return self.dead / (self.tokens * self.layer.neurons)

    @property
    def static_dead(self) -> int:
        """Neurons whose activation is 0 on every token."""
        return self.layer.neurons - int(self.alive.sum())


@dataclass
class Tail:
    """What K thresholds [K] of a layer drop: the mean of CETT and of its square, and the share of neurons kept."""

    cett: Tensor
    error: Tensor
    kept: Tensor


class CettCurves:
    """The thresholds of a model's layers for any CETT, from passes over one text that every question shares.

    passes counts them. Memory: a few tensors [T, I] of at most 2^24 elements, one layer's weight in fp32, and 512 kB
    of counts for each layer; never a text's activations.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[Layer], windows: Windows, progress: Progress | None = None
    ) -> None:
        self._model, self._layers, self._windows, self._progress = model, layers, windows, progress
        self.passes = 0
        self.natural = {layer.name: Natural(layer) for layer in layers}
        self._count()
        # (threshold, CETT) by layer, thresholds ascending.
        self._points = {name: {0.0: 0.0, found.largest: 1.0} for name, found in self.natural.items()}
        self._measure({name: self._first_grid(found) for name, found in self.natural.items()})

    def thresholds(self, cett: float) -> dict[str, float]:
        """Returns every layer's threshold for a CETT: where its curve first rises above it.

        Both neighbours on the curve are measured and within BRACKET of each other, the threshold is between them on
        a straight line of the logarithms; where CETT jumps over the value, it is the last below. A higher CETT
        never gives a lower threshold. At 0 only zeros are dropped, from 1 on everything is.
        """
        if cett <= 0.0:
            return dict.fromkeys(self.natural, 0.0)
        if cett >= 1.0:
            return {name: found.largest for name, found in self.natural.items()}
        for _ in range(_MOST_PASSES):
            wide = {
                name: _between(low[0], high[0])
                for name, (low, high) in self._brackets(cett).items()
                if not _tight(low, high)
            }
            if not wide:
                break
            self._measure(wide)
        return {name: _interpolated(cett, low, high) for name, (low, high) in self._brackets(cett).items()}

    def tails(self, thresholds: Mapping[str, Sequence[float]]) -> dict[str, Tail]:
        """Measures any number of thresholds of each layer in one pass."""
        sums = {layer.name: torch.zeros(3, len(thresholds[layer.name]), dtype=torch.float64) for layer in self._layers}

        def see(layer: Layer, h: Tensor, s: Tensor, real: Tensor | None) -> None:
            if not thresholds[layer.name]:
                return
            weight = dense_weight(layer.linear).detach().float()
            h = h if real is None else h[real]
            for part in torch.split(h, max(1, _CHUNK // h.shape[1])):
                sums[layer.name] += _tail_sums(part, weight, layer.norms, thresholds[layer.name])

        self._run(see)
        tokens = int(real_tokens(self._windows).sum())
        return {
            layer.name: Tail(*(sums[layer.name] / torch.tensor([[tokens], [tokens], [tokens * layer.neurons]])))
            for layer in self._layers
        }

    def _count(self) -> None:
        def see(layer: Layer, h: Tensor, s: Tensor, real: Tensor | None) -> None:
            h, s = (h, s) if real is None else (h[real], s[real])
            size = max(1, _CHUNK // h.shape[1])
            for part, activations in zip(torch.split(h, size), torch.split(s, size), strict=True):
                self.natural[layer.name].add(part, activations)

        self._run(see)
        for name, found in self.natural.items():
            if not found.histogram.finite:
                raise SparsifyError(
                    f"the inputs of {name} are not finite on {self._windows.name}: check the model in this dtype, or "
                    "load it in another (--dtype)"
                )
            if found.largest == 0.0:
                raise SparsifyError(f"the neurons of {name} are all 0 on {self._windows.name}: use another text")

    def _first_grid(self, found: Natural) -> list[float]:
        nonzero = 1.0 - found.zero_ratio
        grid = {found.histogram.threshold((1.0 - share) * nonzero) for share in _SHARES}
        return sorted(t for t in grid if 0.0 < t < found.largest) or [found.largest / 2]

    def _measure(self, wanted: Mapping[str, Sequence[float]]) -> None:
        thresholds = {layer.name: list(wanted.get(layer.name, ())) for layer in self._layers}
        for name, tail in self.tails(thresholds).items():
            points = self._points[name] | dict(zip(thresholds[name], tail.cett.tolist(), strict=True))
            self._points[name] = dict(sorted(points.items()))

    def _brackets(self, cett: float) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
        """Returns for each layer the first point of its curve above the CETT, and the one before it."""
        found = {}
        for name, points in self._points.items():
            curve = list(points.items())
            index = next(i for i, (_, value) in enumerate(curve) if value > cett)
            found[name] = (curve[index - 1], curve[index])
        return found

    def _run(self, see: Callable[[Layer, Tensor, Tensor, Tensor | None], None]) -> None:
        self.passes += 1
        with watched(self._model, self._layers, self._windows, see):
            run_batches(self._model, self._windows.tokens, "CETT", self._progress)


def _tail_sums(h: Tensor, weight: Tensor, norms: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Returns the sums over tokens [3, K] of CETT, its square and the neurons kept, for inputs h [T, I]."""
    score, h = scores(h, norms), h.float()
    size = F.linear(h, weight).norm(dim=-1, dtype=torch.float64)
    rows = []
    for threshold in thresholds:
        dropped = score <= threshold
        tail = F.linear(torch.where(dropped, h, 0.0), weight).norm(dim=-1, dtype=torch.float64)
        ratio = torch.where(tail == 0.0, 0.0, tail / size)
        rows.append(torch.stack([ratio.sum(), ratio.square().sum(), (~dropped).sum().double()]))
    return torch.stack(rows, dim=1).cpu()


def _tight(low: tuple[float, float], high: tuple[float, float]) -> bool:
    if low[0] == 0.0:
        # Each pass looks a million times lower; where even that is above the CETT, only zeros can go.
        return high[0] < 1e-30
    return high[1] <= BRACKET * low[1] or high[0] <= _SAME * low[0]


def _between(low: float, high: float) -> list[float]:
    """Returns GRID thresholds strictly between two, in equal ratios."""
    start = low if low > 0.0 else high * 1e-6
    ratio = math.log(high / start) / (GRID + 1)
    inner = [start * math.exp(ratio * step) for step in range(0 if low == 0.0 else 1, GRID + 1)]
    return [t for t in inner if low < t < high]


def _interpolated(cett: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    if low[1] <= 0.0 or high[1] > BRACKET * low[1]:
        return low[0]
    share = math.log(cett / low[1]) / math.log(high[1] / low[1])
    return low[0] * math.exp(share * math.log(high[0] / low[0]))
