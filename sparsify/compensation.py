"""What is dropped, given back as a bias c of each sparse linear: its mean, or one learned for the whole model (ours).

The mean is c = R·E[(1−m)⊙x], R = W − L, each linear by itself on dense inputs. The learned c minimises
KL(dense ‖ sparse) on calibration text by Adam; nothing else is learned, weights and thresholds stay. It also undoes
what errors add up to over the blocks, and is kept only where it lowers the KL on windows of the calibration text that
it was not learned on. Gradients run straight through the cut (sparsify.trial).
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.allocation import Choices
from sparsify.budget import LinearShape, uncompensated
from sparsify.calibration import Calibration, Progress, ShuffledWindows, hooked, run_batches
from sparsify.fitting import Fit, best, measure_errors
from sparsify.processes import WindowSums
from sparsify.trial import TargetLinear, Trial, dense_log_probabilities, evaluating, input_gradients, kl_divergence

# Steps at most, and passes over the windows at most; windows in a step; share of windows that are held out.
_STEPS, _EPOCHS, _BATCH, _HELD_OUT = 160, 24, 4, 1 / 8
# Adam's largest rate, in units of a linear's typical output; share of the steps in which it rises.
_RATE, _WARM_UP = 0.05, 0.1
# The KL on held-out windows is looked at this often; without a gain by half of them, nothing more is tried.
_LOOKS = 8

_log = logging.getLogger("sparsify.compensation")


def compensate_means(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    fits: Mapping[str, list[Fit]],
    calibration: Calibration,
    progress: Progress | None,
) -> None:
    """Runs the calibration text once more and sets c = R·E[(1−m)⊙x] of the candidates that give it back as a bias.

    The mean is over all tokens, on dense inputs, as thresholds are; R = W − L.
    """
    mended = {name: [fit for fit in options if fit.candidate.compensated] for name, options in fits.items()}
    modules = {name: linears[name].module for name, options in mended.items() if options}
    if not modules:
        return

    sums: WindowSums[tuple[str, int]] = WindowSums(calibration.processes)

    def see(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        for index, fit in enumerate(mended[name]):
            dropped = fit.dropped(x).sum(0, dtype=torch.float64)
            sums.add((name, index), torch.cat([dropped, dropped.new_tensor([len(x)])]))

    with hooked(modules, see):
        run_batches(model, calibration.processes.part(calibration.tokens), "compensate", progress)
    for (name, index), total in sums.totals().items():
        fit = mended[name][index]
        mean = (total[:-1] / int(total[-1])).float()
        fit.compensation = fit.missing(mean, linears[name].weight.detach().float())


def with_uncompensated(choices: Choices, shapes: Mapping[str, LinearShape]) -> Choices:
    """Returns the choices, and after each linear's the same without compensation: its bytes are channels."""
    return {
        name: (*options, *(uncompensated(option, shapes[name]) for option in options if option.compensated))
        for name, options in choices.items()
    }


def learned_or_not(
    model: PreTrainedModel,
    linears: Mapping[str, TargetLinear],
    fits: Mapping[str, list[Fit]],
    calibration: Calibration,
    progress: Progress | None,
) -> dict[str, Fit]:
    """Learns the compensation of the best fits that have one; returns them, or the best without where it is no help.

    A linear whose fits are all of one kind, as a dense one, keeps its best.
    """
    mended = best(_preferred(fits, compensated=True))
    trial = Trial(model, linears)
    trial.place({name: fit.candidate for name, fit in mended.items()})
    for name, fit in mended.items():
        trial.placed[name].threshold = fit.threshold
    learned = learn_compensation(trial, calibration, progress)
    if not learned.compensation:
        return best(_preferred(fits, compensated=False))
    for name, compensation in learned.compensation.items():
        fit = mended[name]
        fit.compensation, fit.error, fit.tokens = compensation, 0.0, 0
    again = {name: [fit] for name, fit in mended.items() if name in learned.compensation}
    measure_errors(model, {name: linears[name] for name in again}, again, calibration, None)
    return mended


def _preferred(fits: Mapping[str, list[Fit]], *, compensated: bool) -> dict[str, list[Fit]]:
    return {
        name: [fit for fit in options if fit.candidate.compensated == compensated] or options
        for name, options in fits.items()
    }


@dataclass(frozen=True)
class Learned:
    """Compensation [O] in fp32 by linear, none where it did not help; KL in nats per token on held-out windows."""

    compensation: Mapping[str, Tensor]
    before: float
    after: float


def learn_compensation(trial: Trial, calibration: Calibration, progress: Progress | None = None) -> Learned:
    """Learns the compensation of the candidates that are placed in the trial, with the thresholds that they have.

    Deterministic on one machine. The candidates' own compensation is not used, and theirs again afterwards. With fewer
    than two windows nothing can be held out, and nothing is learned.
    """
    tokens = calibration.tokens
    held_out = math.ceil(len(tokens) * _HELD_OUT)
    if not any(placed.candidate.compensated for placed in trial.placed.values()):
        return Learned({}, math.nan, math.nan)
    if len(tokens) < 2:
        _log.warning("compensation is not learned from one calibration window: none would be held out")
        return Learned({}, math.nan, math.nan)
    with evaluating(trial.model):
        return _Learner(trial, tokens[:-held_out], tokens[-held_out:]).run(progress)


class _Learner:
    """The units [O] that are learned, the windows to learn on, and the best that held-out windows saw."""

    def __init__(self, trial: Trial, tokens: Tensor, held_out: Tensor) -> None:
        self.trial, self.tokens, self.held_out = trial, tokens, held_out
        self.device = trial.model.device
        windows = [window[None] for window in held_out.to(self.device)]
        self.dense = [(window, dense_log_probabilities(trial.model, window)) for window in windows]
        self.units = {
            name: torch.zeros(linear.weight.shape[0], device=linear.weight.device, requires_grad=True)
            for name, linear in trial.linears.items()
            if trial.placed[name].candidate.compensated
        }
        self.sizes = self._output_sizes()
        self.windows = ShuffledWindows(tokens)

    def run(self, progress: Progress | None) -> Learned:
        before = {name: placed.compensation for name, placed in self.trial.placed.items()}
        try:
            return self._learn(progress)
        finally:
            for name, compensation in before.items():
                self.trial.placed[name].compensation = compensation

    def _learn(self, progress: Progress | None) -> Learned:
        batches = math.ceil(len(self.tokens) / _BATCH)
        steps = min(_STEPS, _EPOCHS * batches)
        looks = sorted({math.ceil(steps * look / _LOOKS) for look in range(1, _LOOKS + 1)})
        # The second moment must be quick: there are few steps.
        optimiser = torch.optim.Adam(self.units.values(), lr=_RATE, betas=(0.9, 0.99))
        start = best = self._held_out_kl()
        found: dict[str, Tensor] = {}
        for step in range(steps):
            rise = min(1.0, (step + 1) / (_WARM_UP * steps))
            for group in optimiser.param_groups:
                group["lr"] = _RATE * rise * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            self._step(optimiser)
            if step + 1 in looks:
                now = self._held_out_kl()
                if now < best:
                    best, found = now, {name: c.detach().clone() for name, c in self._compensation().items()}
                elif not found and 2 * (step + 1) >= steps:
                    break
            if progress is not None:
                progress("compensate", step + 1, steps)
        if progress is not None:
            progress("compensate", steps, steps)
        _log.info("compensation: KL %.4f to %.4f nats per token on held-out calibration windows", start, best)
        return Learned(found, start, best)

    def _step(self, optimiser: torch.optim.Optimizer) -> None:
        tokens = self.windows.next(_BATCH).to(self.device)
        dense = dense_log_probabilities(self.trial.model, tokens)
        optimiser.zero_grad()
        with torch.enable_grad():
            self._place()
            with self.trial.running(), input_gradients(self.trial.model):
                loss = kl_divergence(self.trial.model, tokens, dense) / tokens.numel()
                loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    @torch.no_grad()
    def _held_out_kl(self) -> float:
        self._place()
        with self.trial.running():
            total = sum(float(kl_divergence(self.trial.model, window, dense)) for window, dense in self.dense)
        return total / self.held_out.numel()

    def _place(self) -> None:
        for name, compensation in self._compensation().items():
            self.trial.placed[name].compensation = compensation

    def _compensation(self) -> dict[str, Tensor]:
        return {name: unit * self.sizes[name] for name, unit in self.units.items()}

    @torch.no_grad()
    def _output_sizes(self) -> dict[str, Tensor]:
        """Returns the median |y| of each linear's outputs: what a step is measured in. A few tokens do not move it."""
        sizes: dict[str, Tensor] = {}

        def see(name: str):  # type: ignore[no-untyped-def]
            def hook(module: object, args: object, output: Tensor) -> None:
                sizes[name] = output.float().abs().median()

            return hook

        handles = [linear.module.register_forward_hook(see(name)) for name, linear in self.trial.linears.items()]
        try:
            self.trial.model(input_ids=self.tokens[:_BATCH].to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return sizes
