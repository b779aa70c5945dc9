"""The factor of the L1 term over the steps: stages with sine ramps (ProSparse, arXiv 2402.13516, section 3.2).

In the first stage the factor is constant; in stage i from T_{i−1} to T_i it is
λ(t) = λ_{i−1} + ½·[sin(−π/2 + π·(t−T_{i−1})/(T_i−T_{i−1})) + 1]·(λ_i − λ_{i−1}); behind the last it stays λ_n.
Not covered: the rate of learning, whose schedule is transformers'.
"""

import math
from dataclasses import dataclass

from sparsify.errors import SparsifyError


@dataclass(frozen=True)
class LambdaSchedule:
    """Stage i ends after step ends[i] with the factor factors[i]. Raises SparsifyError for stages out of order."""

    ends: tuple[int, ...]
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.ends or len(self.ends) != len(self.factors):
            raise SparsifyError(
                f"a schedule has one factor for each stage and at least one stage: {len(self.ends)} stage ends and "
                f"{len(self.factors)} factors were given"
            )
        for before, end in zip((0, *self.ends), self.ends, strict=False):
            if end <= before:
                raise SparsifyError(
                    f"the stages of a schedule must follow each other: one ends at step {end}, after one that ends at "
                    f"step {before} (stage ends: {', '.join(map(str, self.ends))})"
                )
        for factor in self.factors:
            if not 0.0 <= factor < math.inf:
                raise SparsifyError(f"a factor of the L1 term must be a finite number of at least 0, not {factor}")

    @property
    def steps(self) -> int:
        """The step at which the last stage ends."""
        return self.ends[-1]

    def at(self, step: int) -> float:
        """Returns λ for the update after `step` updates."""
        if step < self.ends[0]:
            return self.factors[0]
        for index in range(1, len(self.ends)):
            start, end = self.ends[index - 1], self.ends[index]
            if step < end:
                low, high = self.factors[index - 1], self.factors[index]
                ramp = 0.5 * (math.sin(-math.pi / 2 + math.pi * (step - start) / (end - start)) + 1.0)
                return low + ramp * (high - low)
        return self.factors[-1]

    def scaled(self, steps: int, peak: float | None = None) -> "LambdaSchedule":
        """Returns the same stages over another number of steps, and with another last factor if peak is given.

        Raises SparsifyError where there are too few steps for the stages, or the last factor is 0 and peak is not.
        """
        ends = tuple(round(end * steps / self.steps) for end in self.ends)
        if len(set(ends) | {0}) <= len(ends):
            raise SparsifyError(
                f"{len(ends)} stages do not fit into {steps} steps: give more tokens, smaller batches, or fewer stages"
            )
        if peak is None:
            return LambdaSchedule(ends, self.factors)
        if self.factors[-1] == 0.0:
            if peak == 0.0:
                return LambdaSchedule(ends, self.factors)
            raise SparsifyError(f"a schedule whose last factor is 0 cannot be scaled to {peak}: give its factors")
        return LambdaSchedule(ends, tuple(factor * peak / self.factors[-1] for factor in self.factors))
