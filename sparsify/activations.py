"""Activations that transformers does not have, under names that its configurations can say, with their numbers.

A module's numbers are buffers, `model.layers.0.mlp.act_fn.shift`, in the model's dtype: each MLP has its own, and
from_pretrained reads them as any tensor. FATReLU's one number stands in config.json, where vLLM reads it. Importing
sparsify registers them (sparsify.plugin); transformers alone stops at the unknown name, and so runs no other function
in their place. Which of them have zeros: `zero_up_to`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.activations import ACT2FN, ReLUSquaredActivation

from sparsify.errors import SparsifyError

# Behind an activation's name: ReLU after the norms, too (sparsify.relufication, stage 2).
AFTER_NORMS = "_after_norms"
FATRELU_CUT = "hidden_act_param"


class ShiftedReLU(nn.Module):
    """max(x − b, 0), b = `shift` (ReLU Strikes Back, arXiv 2310.04564, section 5.3)."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - self.shift.to(x.dtype))


class FatReLU(nn.Module):
    """x where x > t, else 0 (ProSparse, arXiv 2402.13516, eq. 4; > as in vLLM's FatreluAndMul, the paper has ≥).

    t is `hidden_act_param` of the configuration of the MLP that it becomes a part of, where no `cut` is given.
    """

    def __init__(self, cut: float | None = None) -> None:
        super().__init__()
        self.cut = cut
        if cut is None:
            # transformers makes activations without their configuration: it is their MLP's, which takes them next.
            self._handle = register_module_module_registration_hook(self._join)

    def _join(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is self:
            self._handle.remove()
            del self._handle
            found = getattr(getattr(parent, "config", None), FATRELU_CUT, None)
            self.cut = float(found) if isinstance(found, int | float) and 0.0 <= found < float("inf") else None

    def forward(self, x: Tensor) -> Tensor:
        if self.cut is None:
            raise SparsifyError(
                f"fatrelu has no cut: the configuration of its MLP has no {FATRELU_CUT} that is a number of at least 0"
            )
        # Not F.threshold, which may round t to the dtype of x.
        return torch.where(x.float() <= self.cut, 0.0, x).to(x.dtype)


class NeedsRectified(nn.Module):
    """An activation of models that are made whole by sparsify.rectified, which sets `is_complete`."""

    is_complete = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_complete:
            raise SparsifyError(
                f"a model with {type(self).__name__} has ReLUs in other places, too, which transformers does not put "
                "there without a quantization_config: load it with sparsify.load_dense, or `sparsify` on the command "
                "line"
            )
        found: Tensor = super().forward(x)
        return found


class DReLU(NeedsRectified, nn.ReLU):
    """The gate's half of relu(gate x)·relu(up x) (TurboSparse, arXiv 2406.05955); up is rectified by itself."""


class ReLUAfterNorms(NeedsRectified, nn.ReLU):
    """ReLU of a model whose norms are rectified, too (stage 2)."""


class ReLUSquaredAfterNorms(NeedsRectified, ReLUSquaredActivation):
    """ReLU² of such a model."""


class ShiftedReLUAfterNorms(NeedsRectified, ShiftedReLU):
    """Shifted ReLU of such a model."""


class DReLUAfterNorms(DReLU):
    """dReLU of such a model."""


class PolyReLU(nn.Module):
    """Σ_{i=0..3} a_i·relu(x)^i, a = `coefficients` (PolyCom, arXiv 2411.03884); relu(x)^0 is 1."""

    coefficients: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("coefficients", torch.tensor([0.0, 1.0, 0.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        a = self.coefficients.to(x.dtype)
        r = F.relu(x)
        return a[0] + r * (a[1] + r * (a[2] + r * a[3]))

    @staticmethod
    def features(x: Tensor) -> Tensor:
        """Returns what the coefficients multiply, [4, ...]."""
        r = F.relu(x)
        return torch.stack([torch.ones_like(r), r, r.square(), r.pow(3)])


class PolyNorm(nn.Module):
    """Σ_{i=1..3} w_i·x^i/RMS(x^i) + b over the neurons of a token, w and b = `coefficients` (PolyCom, 2411.03884)."""

    coefficients: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("coefficients", torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x.float())
        found: Tensor = torch.tensordot(self.coefficients.float(), features, dims=1)
        return found.to(x.dtype)

    @staticmethod
    def features(x: Tensor) -> Tensor:
        """Returns what the coefficients multiply, [4, ...]."""
        powers = [x, x.square(), x.pow(3)]
        return torch.stack(
            [*(p * p.square().mean(-1, keepdim=True).add(1e-6).rsqrt() for p in powers), torch.ones_like(x)]
        )


class CRReLU(nn.Module):
    """relu(x) + ε·x·e^{−x²/2}, ε = `coefficients` [1] (EAFO, arXiv 2405.12954), 0.01 before it is fitted."""

    coefficients: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("coefficients", torch.tensor([0.01]))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + self.coefficients.to(x.dtype) * self.features(x)[0]

    @staticmethod
    def features(x: Tensor) -> Tensor:
        """Returns what ε multiplies, [1, ...]."""
        return (x * torch.exp(-x.square() / 2))[None]


# By the names that configurations have: transformers' own first, then ours, and those with ReLUs in other places.
KINDS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": ReLUSquaredActivation,
    "fatrelu": FatReLU,
    "shifted_relu": ShiftedReLU,
    "drelu": DReLU,
    "polyrelu": PolyReLU,
    "polynorm": PolyNorm,
    "crrelu": CRReLU,
}
_WITH_NORMS: dict[str, type[nn.Module]] = {
    "relu": ReLUAfterNorms,
    "relu2": ReLUSquaredAfterNorms,
    "shifted_relu": ShiftedReLUAfterNorms,
    "drelu": DReLUAfterNorms,
}
AFTER_NORMS_KINDS = {f"{name}{AFTER_NORMS}": kind for name, kind in _WITH_NORMS.items()}

_ZERO_BELOW = (nn.ReLU, ReLUSquaredActivation, FatReLU, ShiftedReLU, DReLU, *_WITH_NORMS.values())


def register() -> None:
    """Gives transformers the names that it does not have; a second call does nothing."""
    table: Any = ACT2FN
    for name, kind in (KINDS | AFTER_NORMS_KINDS).items():
        if name not in table:
            table[name] = kind


def is_zero_below(activation: nn.Module | None) -> bool:
    """Whether it is an activation of this module's, or ReLU itself, that is 0 up to some input, and above 0 above."""
    return type(activation) in _ZERO_BELOW


def zero_up_to(activation: nn.Module) -> float:
    """Returns the largest input for which an activation that is_zero_below is 0."""
    if isinstance(activation, ShiftedReLU):
        return float(activation.shift)
    return (activation.cut or 0.0) if isinstance(activation, FatReLU) else 0.0
