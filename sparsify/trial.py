"""A dense model run as if it were converted already: candidates are put in place of its linears, tried and taken out.

Nothing is copied but low-rank factors. `calibrating` sets thresholds from dense forwards, as the conversion does, and
`running` runs the candidates with them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.budget import Candidate
from sparsify.calibration import ScoreHistogram, hooked
from sparsify.kernels.reference import scores, sparse_linear
from sparsify.kernels.spec import SparseTensors
from sparsify.low_rank import LowRank, Svd, low_rank
from sparsify.targets import dense_weight


@dataclass
class TargetLinear:
    """A linear that will become sparse, and what its candidates share; svd says how its weight is decomposed."""

    module: nn.Module
    site: int
    column_norm: Tensor
    svd: Svd = "auto"
    spectrum: LowRank | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight [O, I]."""
        return dense_weight(self.module)

    def factors(self, rank: int) -> tuple[Tensor | None, Tensor | None]:
        """Returns (lr_a [R, I], lr_b [O, R]) of the truncated SVD, (None, None) for rank 0; decomposed on demand."""
        if not rank:
            return None, None
        if self.spectrum is None or self.spectrum.lr_a.shape[0] < rank:
            self.spectrum = low_rank(self.weight, rank, self.svd)
        return self.spectrum.truncated(rank)

    def decompose(self, candidates: Iterable[Candidate]) -> None:
        """Makes the factors of the largest rank at once, of which those of smaller ranks are parts."""
        self.factors(max(candidate.rank for candidate in candidates))

    def residual(self, rank: int) -> Tensor:
        """Returns R = W − lr_b·lr_a [O, I] in fp32: dropping channel j costs |x_j|·‖R[:, j]‖."""
        lr_a, lr_b = self.factors(rank)
        weight = self.weight.detach().float()
        return weight if lr_a is None or lr_b is None else weight - lr_b.float() @ lr_a.float()

    def through_residual(self, rows: Tensor, rank: int) -> Tensor:
        """Returns rows [K, O] times R [K, I] in fp32, without forming R."""
        lr_a, lr_b = self.factors(rank)
        product = rows.float() @ self.weight.detach().float()
        return product if lr_a is None or lr_b is None else product - (rows.float() @ lr_b.float()) @ lr_a.float()

    def scale(self, candidate: Candidate) -> Tensor | None:
        """Returns the candidate's score scales [I] in fp32, None where the score is the magnitude."""
        if candidate.score == "magnitude":
            return None
        return self.column_norm if candidate.score == "column-norm" else self.residual(candidate.rank).norm(dim=0)


@dataclass(frozen=True)
class Call:
    """One forward of a linear under trial: its input x and the scores of its channels, both [T, I], detached."""

    x: Tensor
    score: Tensor


# Share of a linear's channels that count as near its threshold.
_BAND = 0.2

# Called with the linear's name and its call; returns what sees the gradient [T, O] of the loss by the linear's output.
Observer = Callable[[str, Call], Callable[[Tensor], None]]


@dataclass
class Placed:
    """A candidate with its tensors; histogram and threshold are what `calibrating` saw last.

    compensation [O] in fp32 is added to the output, and may be learned.
    """

    candidate: Candidate
    lr_a: Tensor | None
    lr_b: Tensor | None
    scale: Tensor | None
    histogram: ScoreHistogram | None = None
    threshold: float = -1.0
    compensation: Tensor | None = None

    def scores(self, x: Tensor) -> Tensor:
        """Returns the scores [T, I] in fp32 of an input [..., I]."""
        return scores(x.detach().reshape(-1, x.shape[-1]), self.scale)

    def band(self) -> tuple[float, float]:
        """Returns the scores (low, high] between which the channels near the threshold lie."""
        assert self.histogram is not None
        density = self.candidate.density
        half = min(_BAND / 2, density / 2, max(1.0 - density, 0.02))
        return self.histogram.threshold(density + half), self.histogram.threshold(density - half)

    def calibrate(self, score: Tensor) -> None:
        self.histogram = ScoreHistogram()
        self.histogram.add(score)
        self.threshold = self.histogram.threshold(self.candidate.density)


@dataclass
class Trial:
    """The model with candidates in the place of its linears; `place` changes them, `running` installs them."""

    model: PreTrainedModel
    linears: Mapping[str, TargetLinear]
    observer: Observer | None = None
    placed: dict[str, Placed] = field(default_factory=dict)

    def place(self, candidates: Mapping[str, Candidate]) -> None:
        """Puts candidates in place; linears that the mapping does not name keep theirs, dense where they have none."""
        for name, candidate in candidates.items():
            linear = self.linears[name]
            self.placed[name] = Placed(candidate, *linear.factors(candidate.rank), linear.scale(candidate))

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Inside, each forward of the dense model sets the thresholds of all placed candidates from its own tokens."""
        modules = {name: self.linears[name].module for name in self.placed}

        def see(name: str, x: Tensor) -> None:
            self.placed[name].calibrate(self.placed[name].scores(x))

        with hooked(modules, see):
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, forwards of the model run the placed candidates."""
        for name in self.placed:
            self.linears[name].module.forward = self._forward_of(name)
        try:
            yield
        finally:
            for name in self.placed:
                del self.linears[name].module.forward

    def _forward_of(self, name: str) -> Callable[[Tensor], Tensor]:
        linear, placed = self.linears[name], self.placed[name]
        bias: Any = linear.module.bias

        def forward(x: Tensor) -> Tensor:
            threshold = torch.tensor(placed.threshold, device=x.device)
            tensors = SparseTensors(linear.weight, bias, threshold, placed.scale, placed.lr_a, placed.lr_b)
            with torch.no_grad():
                y = sparse_linear(x, tensors)
            if torch.is_grad_enabled() and x.requires_grad:
                y = _StraightThrough.apply(x, y, linear.weight)  # type: ignore[no-untyped-call]
            if placed.compensation is not None:
                y = y + placed.compensation.to(y.dtype)
            if self.observer is not None and y.requires_grad:
                call = Call(x.detach().reshape(-1, x.shape[-1]), placed.scores(x))
                see_gradient = self.observer(name, call)

                def see(gradient: Tensor) -> None:
                    see_gradient(gradient.detach().reshape(-1, gradient.shape[-1]))

                y.register_hook(see)  # type: ignore[no-untyped-call]
            return y

        return forward


class _StraightThrough(torch.autograd.Function):
    """y forward, the dense linear's gradient backward: ∂L/∂x = (∂L/∂y) W.

    A moved input also crosses thresholds, which the derivative of x ⊙ keep leaves out: with that derivative, gradients
    came out 7 times too small after five blocks (docs/allocation.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None, None


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode and its parameters take no gradients."""
    learned = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        model.train(was_training)


@contextmanager
def input_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the input embedding's output starts the graph, so that a backward reaches every linear's output."""
    embedding: Any = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def dense_log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Returns log p [B, S, V] of the model as it runs now, in fp32, without a graph."""
    with torch.no_grad():
        return F.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), dim=-1)


def kl_divergence(model: PreTrainedModel, tokens: Tensor, dense: Tensor) -> Tensor:
    """Returns Σ KL(dense ‖ model) in nats over tokens [B, S]; dense [B, S, V] holds log-probabilities."""
    now = F.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), dim=-1)
    return (dense.exp() * (dense - now)).sum()


def least_output_error(linear: TargetLinear, options: tuple[Candidate, ...], x: Tensor) -> Candidate:
    """Returns the option with the least mean of ‖ŷ − y‖²/‖y‖² over inputs x [T, I], each at its threshold there."""
    if len(options) == 1:
        return options[0]
    linear.decompose(options)
    outputs = (x.float() @ linear.weight.float().t()).square().sum(-1).clamp_min(1e-30)

    def error(option: Candidate) -> float:
        placed = Placed(option, None, None, linear.scale(option))
        score = placed.scores(x)
        placed.calibrate(score)
        dropped = torch.where(score > placed.threshold, 0.0, x.float())
        missing = dropped @ linear.residual(option.rank).t()
        return float((missing.square().sum(-1) / outputs).sum(dtype=torch.float64))

    return min(options, key=error)
