"""How sparse a dense model could be, estimated in one short pass: channels that could go at some output error.

For each linear the channels with the smallest |x_j|·‖W_:j‖ of each token are dropped, at steps of 10%, and the error
‖W(x − x·keep)‖² / ‖Wx‖² is averaged over tokens. Inputs are the dense model's, so errors do not add up from layer to
layer here as they do in a sparse model, and no low rank is used: this estimates, `measure` and `convert` measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.calibration import Calibration, Progress, hooked, run_batches
from sparsify.evals.report_text import place
from sparsify.targets import dense_weight, find_targets

ERRORS = (0.01, 0.05)
_STEPS = tuple(step / 10 for step in range(1, 10))
# Of a window: a product for each step and token is most of the time.
_TOKENS = 32


@dataclass(frozen=True)
class Headroom:
    """One kind of linear over all layers; sparsity: the share of its bytes that could go, by relative output error.

    zeros: the share of its inputs that are 0 already.
    """

    linear: str
    bytes: int
    zeros: float
    sparsity: dict[str, float]


class _Sums:
    def __init__(self) -> None:
        self.errors = torch.zeros(len(_STEPS), dtype=torch.float64)
        self.tokens, self.zeros, self.inputs = 0, 0, 0


def headroom(model: PreTrainedModel, calibration: Calibration, progress: Progress | None = None) -> list[Headroom]:
    """Returns the kinds of linears that a conversion would make sparse, and in the end "all", weighted by bytes."""
    targets = find_targets(model, calibration.tokens[:1, :8])
    modules = dict(model.named_modules())
    linears = {name: modules[name] for name in targets.names}
    sums = {name: _Sums() for name in linears}

    def see(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows):
            _add(sums[name], rows[:: max(1, len(rows) // _TOKENS)][:_TOKENS], linears[name])

    with hooked(linears, see):
        run_batches(model, calibration.tokens, "estimate", progress)
    kinds: dict[str, list[str]] = {}
    for name in linears:
        if sums[name].tokens:
            kinds.setdefault(place(name)[1], []).append(name)
    found = [_kind(kind, names, linears, sums) for kind, names in kinds.items()]
    return [*found, _all(found)]


def _add(sums: _Sums, x: Tensor, linear: nn.Module) -> None:
    weight = dense_weight(linear).detach().float()
    x = x.float()
    order = (x.abs() * weight.norm(dim=0)).argsort(dim=-1)
    full = (x @ weight.T).square().sum(-1)
    for index, share in enumerate(_STEPS):
        dropped = torch.zeros_like(x)
        smallest = order[:, : round(share * x.shape[-1])]
        dropped.scatter_(-1, smallest, x.gather(-1, smallest))
        error = (dropped @ weight.T).square().sum(-1) / full.clamp(min=torch.finfo(torch.float32).tiny)
        sums.errors[index] += error.double().sum().cpu()
    sums.tokens += len(x)
    sums.zeros += int((x == 0).sum())
    sums.inputs += x.numel()


def _kind(kind: str, names: Sequence[str], linears: dict[str, nn.Module], sums: dict[str, _Sums]) -> Headroom:
    curve = torch.stack([sums[name].errors / sums[name].tokens for name in names]).mean(0).tolist()
    weights = [dense_weight(linears[name]) for name in names]
    return Headroom(
        linear=kind,
        bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        zeros=sum(sums[name].zeros for name in names) / sum(sums[name].inputs for name in names),
        sparsity={f"{error:g}": share_at(curve, error) for error in ERRORS},
    )


def share_at(curve: Sequence[float], error: float) -> float:
    """Returns the share at which the error is reached, linear between the steps of 10%; 0.9 where it never is."""
    before, low = 0.0, 0.0
    for share, value in zip(_STEPS, curve, strict=True):
        if value > error:
            return before + (share - before) * (error - low) / (value - low)
        before, low = share, value
    return before


def _all(found: Sequence[Headroom]) -> Headroom:
    total = sum(kind.bytes for kind in found)

    def mean(values: Sequence[float]) -> float:
        return sum(kind.bytes * value for kind, value in zip(found, values, strict=True)) / total

    shares = {error: mean([kind.sparsity[error] for kind in found]) for error in found[0].sparsity}
    return Headroom("all", total, mean([kind.zeros for kind in found]), shares)
