"""Ours: bytes go where the next one lowers the loss most, measured on the model that is sparse already.

The loss is KL(dense ‖ sparse) on calibration text. Two measurements, each a forward and a backward for all linears:

1. How a linear spends its share. Every candidate's error e = R x_dropped is weighed by gradients of the loss by the
   linear's output at other tokens, Σ ‖G e‖² with the rows of G such gradients: a sampled Fisher matrix. It chooses
   score and rank together, at the same bytes.
2. What one more byte is worth. Channels whose score is near the threshold are those that a byte more or less would
   switch; switching channel j of a token on changes the loss by g·R_j x_j to first order, g the gradient by the
   linear's output. Its mean over the band, by the bytes of a channel, is the linear's value of a byte.

Shares then follow the values multiplicatively, step by step, until a byte is worth the same everywhere (the condition
of an optimum under one budget); the shares of the last steps are averaged. Marginals of single linears in a dense
model are not used: they do not see how errors add up. Not covered: a guarantee of a global optimum.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.allocation import Choices, Needs, Problem, Size, Work, nearest, refuse_recipe, refuse_token_cuts
from sparsify.budget import Candidate, fill_budget
from sparsify.calibration import ShuffledWindows
from sparsify.errors import SparsifyError
from sparsify.trial import Call, Trial, dense_log_probabilities, evaluating, input_gradients, kl_divergence

SUMMARY = "bytes where they lower the KL to the dense model most, by gradients in the sparse model"
PAPER = "ours; docs/allocation.md"

# How much of the sums of a step is kept in the next.
_MEMORY = 0.8
# Exponent of a step, before and after the share of steps after which it is smaller and shares are averaged.
_RATE, _LATE_RATE, _LATE = 0.15, 0.06, 0.6
# Tokens and gradients with which candidates of a linear are compared.
_TOKENS, _GRADIENTS = 512, 256


@dataclass(frozen=True)
class Sensitivity:
    """steps: gradient steps on the shares, 0 for uniform shares; batch: calibration windows in each."""

    steps: int = 24
    batch: int = 4

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SparsifyError(f"{name} of allocation sensitivity is {value!r}: it must be an integer ≥ {least}")

    @property
    def name(self) -> str:
        return "sensitivity"

    @property
    def needs(self) -> Needs:
        return "model"

    def choices(self, problem: Problem) -> Choices:
        refuse_recipe(self.name, problem)
        refuse_token_cuts(self.name, problem)
        if problem.method.sparsity == 0.0:
            return {name: problem.offers(name, 1.0) for name in problem.shapes}
        search = _Search(problem, self.batch)
        total = self.steps + 2
        with evaluating(problem.model):
            search.choose()
            problem.report("allocate", 1, total)
            late: list[dict[str, float]] = []
            for step in range(self.steps):
                if step and step == self.steps // 2:
                    search.choose()
                in_late_part = step >= _LATE * self.steps
                search.step(_LATE_RATE if in_late_part else _RATE)
                if in_late_part:
                    late.append(dict(search.shares))
                problem.report("allocate", step + 2, total)
            if late:
                means = {name: sum(math.log(shares[name]) for shares in late) / len(late) for name in search.shares}
                search.fill({name: math.exp(mean) for name, mean in means.items()})
                search.choose()
        problem.report("allocate", total, total)
        return {name: (candidate,) for name, candidate in search.candidates().items()}

    def work(self, size: Size) -> Work:
        """Each measurement is a dense forward, a sparse one and a backward, and the products with R."""
        if size.sparsity == 0.0:
            return Work()
        chosen = 3 if self.steps > 1 else 2
        kinds = chosen if size.chosen else 0
        windows = (self.steps + kinds) * self.batch
        # Of a candidate's 256 rows and 512 inputs, as parts of a window's tokens, whatever their number.
        offered = kinds * size.candidates
        return Work(
            forwards=3.0 * windows,
            heads=3.0 * windows,
            products=float(self.steps * self.batch),
            counted=2.0 * windows,
            decompositions=2.0 if size.chosen else 0.0,
            batch=self.batch,
            sampled=float(offered),
        )


@dataclass
class _Value:
    """Decaying sums over the channels near one linear's threshold: −ΔKL by switching them on, and their number."""

    gain: float = 0.0
    count: float = 0.0


class _Search:
    """The shares of now, the kind of candidate that each linear prefers, and the calibration windows still to use."""

    def __init__(self, problem: Problem, batch: int) -> None:
        uniform = 1.0 - problem.method.sparsity
        self.problem = problem
        self.batch = batch
        self.least = problem.least_shares()
        self.shares = dict.fromkeys(problem.shapes, uniform)
        self.kinds = {name: problem.offers(name, uniform)[0] for name in problem.shapes}
        self.values = {name: _Value() for name in problem.shapes}
        self.trial = Trial(problem.model, problem.linears)
        self.windows = ShuffledWindows(problem.calibration.tokens)

    def fill(self, wishes: Mapping[str, float]) -> None:
        problem = self.problem
        self.shares = fill_budget(wishes, problem.shapes, sparsity=problem.method.sparsity, least=self.least)

    def candidates(self) -> dict[str, Candidate]:
        """Returns each linear's candidate of its preferred kind at its share."""
        return {name: nearest(self.problem.offers(name, self.shares[name]), self.kinds[name]) for name in self.shares}

    def choose(self) -> None:
        """Measures all that the method offers at the shares of now, and prefers the least weighed error."""
        offers = {name: self.problem.offers(name, self.shares[name]) for name in self.shares}
        if all(len(options) == 1 for options in offers.values()):
            return
        for name, options in offers.items():
            self.problem.linears[name].decompose(options)
        errors = {name: [0.0] * len(options) for name, options in offers.items()}

        def observe(name: str, call: Call) -> Callable[[Tensor], None]:
            def see(gradient: Tensor) -> None:
                linear = self.problem.linears[name]
                x = call.x[:: max(1, len(call.x) // _TOKENS)].float()
                rows = gradient[:: max(1, len(gradient) // _GRADIENTS)]
                for index, candidate in enumerate(offers[name]):
                    weighed = linear.through_residual(rows, candidate.rank)
                    error = _dropped(x, linear.scale(candidate), candidate) @ weighed.T
                    errors[name][index] += float(error.square().sum(dtype=torch.float64))

            return see

        self._measure(observe)
        for name, options in offers.items():
            self.kinds[name] = options[errors[name].index(min(errors[name]))]

    def step(self, rate: float) -> None:
        """Measures the value of a byte in each linear and moves the shares by it."""
        for value in self.values.values():
            value.gain, value.count = _MEMORY * value.gain, _MEMORY * value.count

        def observe(name: str, call: Call) -> Callable[[Tensor], None]:
            near = self._near_threshold(name, call.score)

            def see(gradient: Tensor) -> None:
                rank = self.trial.placed[name].candidate.rank
                gains = -self.problem.linears[name].through_residual(gradient, rank) * call.x.float()
                self.values[name].gain += float(gains[near].sum(dtype=torch.float64))
                self.values[name].count += float(near.sum())

            return see

        self._measure(observe)
        shapes = self.problem.shapes
        worth = {
            name: max(value.gain, 0.0) / max(value.count, 1.0) / (shapes[name].outputs * shapes[name].element_size)
            for name, value in self.values.items()
        }
        spent = {name: share * shapes[name].dense_bytes for name, share in self.shares.items()}
        mean = sum(worth[name] * spent[name] for name in spent) / sum(spent.values())
        if mean <= 0.0:
            # Nothing lost that bytes could bring back: as at a budget where every channel is kept.
            return
        ratios = {name: min(value / mean, 3.0) for name, value in worth.items()}
        # (r − 1)/(1 + r/2): −1 for a byte worth nothing, +0.8 at the cap, so that no step is large.
        self.fill({n: self.shares[n] * math.exp(rate * (r - 1.0) / (1.0 + r / 2)) for n, r in ratios.items()})

    def _near_threshold(self, name: str, score: Tensor) -> Tensor:
        """Returns the channels [T, I] near the threshold."""
        low, high = self.trial.placed[name].band()
        return (score > low) & (score <= high)

    def _measure(self, observe: Callable[[str, Call], Callable[[Tensor], None]]) -> None:
        """Runs the candidates of now, forward and backward, on the next windows."""
        tokens = self.windows.next(self.batch).to(self.problem.model.device)
        self.trial.place(self.candidates())
        self.trial.observer = observe
        with self.trial.calibrating():
            dense = dense_log_probabilities(self.problem.model, tokens)
        with self.trial.running(), input_gradients(self.problem.model), torch.enable_grad():
            loss = kl_divergence(self.problem.model, tokens, dense)
            if not bool(loss.isfinite()):
                raise SparsifyError(
                    "the logits of the sparse model are not finite on the calibration text, so no allocation can be "
                    "measured: check the model in this dtype, or load it in another (--dtype)"
                )
            loss.backward()  # type: ignore[no-untyped-call]


def _dropped(x: Tensor, scale: Tensor | None, candidate: Candidate) -> Tensor:
    """Returns x [T, I] without the channels that the candidate would keep, at the exact quantile of these tokens."""
    score = x.abs() if scale is None else x.abs() * scale
    dropped = round((1.0 - candidate.density) * score.numel())
    if dropped < 1:
        return torch.zeros_like(x)
    return torch.where(score > score.flatten().kthvalue(dropped).values, 0.0, x)


ALLOCATION = Sensitivity
