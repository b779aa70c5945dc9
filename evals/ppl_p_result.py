"""What a PPL-p% measurement found: one point for each rule and tolerance, and the dense model beside them."""

from dataclasses import asdict, dataclass
from typing import Any

from sparsify.evals.perplexity import Perplexity

NAMES = {"mlp": "PPL-p% sparsity", "linears": "PPL-p% channel sparsity"}


@dataclass(frozen=True)
class LayerPoint:
    """A layer at one tolerance: what its neurons are compared with (a threshold, ε or k) and the share kept.

    cett: its mean CETT on dense activations; error: the mean square of that; dense_activation_ratio: the share of
    neurons above the threshold on dense activations of the CETT text. These three are for the rule cett only.
    """

    name: str
    cut: float
    activation_ratio: float
    cett: float | None = None
    error: float | None = None
    dense_activation_ratio: float | None = None


@dataclass(frozen=True)
class Point:
    """One rule at one tolerance p, None for rule zero. setting: the CETT, the share dropped by top-k, or ε."""

    rule: str
    p: float | None
    setting: float
    perplexity: float
    nll_per_token: float
    rise: float
    activation_ratio: float
    layers: tuple[LayerPoint, ...]

    @property
    def sparsity(self) -> float:
        return 1.0 - self.activation_ratio

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sparsity": self.sparsity}


@dataclass(frozen=True)
class NaturalLayer:
    """What a layer of the dense model leaves at zero: inputs that are 0, activations that are 0, neurons always 0."""

    name: str
    neurons: int
    zero_ratio: float
    dynamic_dead_rate: float
    static_dead: int


@dataclass(frozen=True)
class PplP:
    """A measured model. dense: its own perplexity; left_out: what of its blocks has neurons that are not measured.

    cett_passes and perplexities: how often the texts were run.
    """

    scope: str
    dense: Perplexity
    points: tuple[Point, ...]
    natural: tuple[NaturalLayer, ...]
    left_out: tuple[str, ...]
    cett_passes: int
    perplexities: int

    def to_dict(self) -> dict[str, Any]:
        layers = self.natural
        return {
            "metric": NAMES[self.scope],
            "scope": self.scope,
            "dense": self.dense.to_dict(),
            "points": [point.to_dict() for point in self.points],
            "natural": {
                "zero_ratio": sum(layer.zero_ratio for layer in layers) / len(layers),
                "dynamic_dead_rate": sum(layer.dynamic_dead_rate for layer in layers) / len(layers),
                "static_dead": sum(layer.static_dead for layer in layers),
                "neurons": sum(layer.neurons for layer in layers),
                "layers": [asdict(layer) for layer in layers],
            },
            "left_out": list(self.left_out),
            "cett_passes": self.cett_passes,
            "perplexities": self.perplexities,
        }
