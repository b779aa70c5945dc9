"""Four ways to say which neurons of a token contribute weakly (arXiv 2411.02335, section 4.1), each with one setting.

cett: ‖n_i‖ ≤ the layer's threshold for one CETT, the same CETT in every layer. top-k: all but the k largest |s_i| of a
token, the same share in every layer. fatrelu: |s_i| < ε, one ε for all layers; the paper's FAT-ε, which differs from
FATReLU (arXiv 2010.07859) by the absolute value, without which SiLU's negative outputs would all be lost. zero:
s_i = 0, the paper's "straightforward ReLU", without a setting.
s is the activation σ(W_gate x) of an MLP; in scope linears it is the linear's input. The authors' top-k code ranks all
activations of a batch together; we rank each token's, as the paper says.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sparsify.errors import SparsifyError, suggest
from sparsify.evals.cett import CettCurves
from sparsify.evals.neurons import Layer
from sparsify.kernels.reference import keep_mask
from sparsify.token_cut import top_k_mask

RULES = ("cett", "top-k", "fatrelu", "zero")

# Called with a layer, h and s [T, I]; returns the neurons kept [T, I], bool.
Keep = Callable[[Layer, Tensor, Tensor], Tensor]


class Rule(Protocol):
    """A rule whose setting goes from 0, dense, to `most`, where every neuron is dropped; in steps where step > 0."""

    name: str
    most: float
    step: float

    def keep(self, setting: float) -> Keep: ...

    def cut(self, layer: Layer, setting: float) -> float:
        """Returns what a layer compares with at this setting: its threshold, ε, or k."""
        ...


def check_rule(name: str) -> str:
    """Returns the name. Raises SparsifyError for an unknown one."""
    if name not in RULES:
        raise SparsifyError(f"unknown rule {name!r}: allowed are {', '.join(RULES)}.{suggest(name, RULES)}")
    return name


def make_rule(name: str, curves: CettCurves) -> Rule:
    """Returns a rule for the model of the curves. Raises SparsifyError for an unknown name."""
    check_rule(name)
    kinds: dict[str, Callable[[CettCurves], Rule]] = {"cett": _Cett, "top-k": _TopK, "fatrelu": _FatRelu, "zero": _Zero}
    return kinds[name](curves)


class _Cett:
    name, most, step = "cett", 1.0, 0.0

    def __init__(self, curves: CettCurves) -> None:
        self._curves = curves
        # By setting, in fp32 as layers hold and compare them. Kept: what the curves learn later could move one.
        self._cuts: dict[float, dict[str, Tensor]] = {}

    def keep(self, setting: float) -> Keep:
        cuts = self._at(setting)
        return lambda layer, h, s: keep_mask(h, cuts[layer.name].to(h.device), layer.norms)

    def cut(self, layer: Layer, setting: float) -> float:
        return float(self._at(setting)[layer.name])

    def _at(self, setting: float) -> dict[str, Tensor]:
        if setting not in self._cuts:
            found = self._curves.thresholds(setting)
            self._cuts[setting] = {name: torch.tensor(value) for name, value in found.items()}
        return self._cuts[setting]


class _TopK:
    name, most = "top-k", 1.0

    def __init__(self, curves: CettCurves) -> None:
        self.step = 1.0 / max(found.layer.neurons for found in curves.natural.values())

    def keep(self, setting: float) -> Keep:
        def keep(layer: Layer, h: Tensor, s: Tensor) -> Tensor:
            return top_k_mask(s.float().abs(), torch.tensor(self.cut(layer, setting), device=s.device))

        return keep

    def cut(self, layer: Layer, setting: float) -> float:
        return float(round((1.0 - setting) * layer.neurons))


class _FatRelu:
    name, step = "fatrelu", 0.0

    def __init__(self, curves: CettCurves) -> None:
        # A little more than the largest activation: the cut is strict.
        self.most = 1.0001 * max(found.largest_activation for found in curves.natural.values())

    def keep(self, setting: float) -> Keep:
        return lambda layer, h, s: ~(s.float().abs() < setting)

    def cut(self, layer: Layer, setting: float) -> float:
        return setting


class _Zero:
    name, most, step = "zero", 0.0, 0.0

    def __init__(self, curves: CettCurves) -> None:
        pass

    def keep(self, setting: float) -> Keep:
        return lambda layer, h, s: s != 0

    def cut(self, layer: Layer, setting: float) -> float:
        return 0.0
