"""TEAL's block-wise greedy allocation (arXiv 2408.14690, Algorithm 1): bytes leave the linear that hurts least.

In each block all linears start dense. A step takes `step` of the block's bytes from one linear, which raises its
sparsity by step · (block's bytes / its bytes); the linear is the one for which the block's output then errs least,
mean over tokens of ‖F(x) − F̂(x)‖₂. It ends where the block has the sparsity that was asked for.

Where we differ from the public code: the norm is over the hidden dimension of each token, the relative sizes are the
linears' own (which makes them right for grouped queries), the text is the calibration's, never the evaluation's, and
the last step is as small as the budget needs. Not covered: a budget that moves between blocks.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.allocation import Choices, Needs, Problem, Size, Work, nearest, refuse_recipe, refuse_token_cuts
from sparsify.budget import check_share
from sparsify.calibration import hooked
from sparsify.errors import SparsifyError
from sparsify.targets import decoder_blocks
from sparsify.trial import TargetLinear, Trial, evaluating, least_output_error

SUMMARY = "block by block, bytes leave the linear whose loss changes the block's output least"
PAPER = "TEAL's Algorithm 1, Liu et al. 2024, arXiv 2408.14690"


@dataclass(frozen=True)
class Greedy:
    """step: share of a block's bytes in one step; windows: calibration windows; most: a linear's highest sparsity."""

    step: float = 0.025
    windows: int = 2
    most: float = 0.95

    def __post_init__(self) -> None:
        check_share("step of allocation greedy", self.step, one_allowed=False)
        check_share("most of allocation greedy", self.most, one_allowed=False)
        if self.step == 0.0:
            raise SparsifyError("step of allocation greedy is 0: it must be above 0")
        if isinstance(self.windows, bool) or not isinstance(self.windows, int) or self.windows < 1:
            raise SparsifyError(
                f"windows of allocation greedy is {self.windows!r}: it must be an integer of at least 1"
            )

    @property
    def name(self) -> str:
        return "greedy"

    @property
    def needs(self) -> Needs:
        return "block"

    def choices(self, problem: Problem) -> Choices:
        refuse_recipe(self.name, problem)
        refuse_token_cuts(self.name, problem)
        target = problem.method.sparsity
        if target > self.most:
            raise SparsifyError(
                f"sparsity {target} is above {self.most}, the most that allocation greedy gives a linear"
            )
        prefix, blocks = decoder_blocks(problem.model)
        tokens = problem.calibration.tokens[: self.windows].to(problem.model.device)
        choices: Choices = {}
        with evaluating(problem.model), torch.inference_mode():
            for index, block in enumerate(blocks):
                linears = {n: t for n, t in problem.linears.items() if n.startswith(f"{prefix}.{index}.")}
                if linears:
                    sparsities = _Block(problem, block, linears, tokens).allocate(target, self.step, self.most)
                    choices |= {name: problem.offers(name, 1.0 - s) for name, s in sparsities.items()}
                problem.report("allocate", index + 1, len(blocks))
        return {name: choices[name] for name in problem.shapes}

    def work(self, size: Size) -> Work:
        """A forward of the model for each block, to record it, and one of the block for each linear and step."""
        steps = math.ceil(size.sparsity / self.step)
        tried = steps * size.linears / max(size.blocks, 1)
        return Work(
            forwards=self.windows * (size.blocks + tried),
            products=float(self.windows * (1 + size.candidates)) if size.chosen else 0.0,
            counted=self.windows * 2.0 * tried,
            decompositions=1.0 if size.chosen else 0.0,
            batch=self.windows,
        )


class _Block:
    """One block with its dense inputs and outputs on some tokens, and its linears' dense inputs."""

    def __init__(self, problem: Problem, block: nn.Module, linears: Mapping[str, TargetLinear], tokens: Tensor) -> None:
        self.problem, self.block = problem, block
        self.least = problem.least_shares()
        self.sizes = {name: problem.shapes[name].dense_bytes for name in linears}
        self.trial = Trial(problem.model, linears)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.outputs: list[Tensor] = []
        inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
        modules = {name: linear.module for name, linear in linears.items()}
        with self._recording(), hooked(modules, lambda name, x: inputs[name].append(x.reshape(-1, x.shape[-1]))):
            for window in tokens:
                problem.model.base_model(input_ids=window[None], use_cache=False)
        self.inputs = {name: torch.cat(parts) for name, parts in inputs.items()}
        uniform = 1.0 - problem.method.sparsity
        self.kinds = {
            name: least_output_error(linear, problem.offers(name, uniform), self.inputs[name])
            for name, linear in linears.items()
        }

    def allocate(self, target: float, step: float, most: float) -> dict[str, float]:
        """Returns each linear's sparsity; Σ sparsity · bytes = target · Σ bytes."""
        block_bytes = sum(self.sizes.values())
        sparsities = dict.fromkeys(self.sizes, 0.0)
        for name in sparsities:
            self._place(name, 0.0)
        highest = {name: min(most, 1.0 - self.least[name]) for name in self.sizes}
        remaining = target * block_bytes
        while remaining > 1e-9 * block_bytes:
            taken = min(step * block_bytes, remaining)
            raised = {name: sparsities[name] + taken / size for name, size in self.sizes.items()}
            trials = {name: value for name, value in raised.items() if value <= highest[name]}
            if not trials:
                # Only parts of a step are left.
                trials = {name: highest[name] for name in raised if highest[name] > sparsities[name]}
            if not trials:
                raise SparsifyError(f"sparsity {target} is too high for allocation greedy: use uniform or sensitivity")
            errors = {name: self._error_with(name, sparsities[name], value) for name, value in trials.items()}
            best = min(errors, key=lambda name: errors[name])
            remaining -= (trials[best] - sparsities[best]) * self.sizes[best]
            sparsities[best] = trials[best]
            self._place(best, sparsities[best])
        return sparsities

    @contextmanager
    def _recording(self) -> Iterator[None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.calls.append((args, kwargs))
            self.outputs.append(_hidden(output).float())

        handle = self.block.register_forward_hook(record, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _place(self, name: str, sparsity: float) -> None:
        candidate = nearest(self.problem.offers(name, 1.0 - sparsity), self.kinds[name])
        self.trial.place({name: candidate})
        placed = self.trial.placed[name]
        placed.calibrate(placed.scores(self.inputs[name]))

    def _error_with(self, name: str, now: float, tried: float) -> float:
        """Returns the block's error with one linear at another sparsity, and puts it back."""
        self._place(name, tried)
        error = self._error()
        self._place(name, now)
        return error

    def _error(self) -> float:
        """Returns the mean over tokens of ‖F(x) − F̂(x)‖₂, the norm over the hidden dimension."""
        total, tokens = 0.0, 0
        with self.trial.running():
            for (args, kwargs), dense in zip(self.calls, self.outputs, strict=True):
                norms = (_hidden(self.block(*args, **kwargs)).float() - dense).norm(dim=-1)
                total += float(norms.sum(dtype=torch.float64))
                tokens += norms.numel()
        return total / tokens


def _hidden(output: Any) -> Tensor:
    """Returns the hidden states [B, S, D] of what a block returns, alone or first of a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


ALLOCATION = Greedy
