"""The largest setting of a sparsity rule whose rise in perplexity stays within a tolerance, for several tolerances.

A bracketing search: dense at setting 0, a setting with too large a rise at the other end. The next setting is where a
power law through both ends meets the tolerance, never nearer to an end than a tenth of the (logarithmic) bracket, so
the bracket shrinks as in bisection, usually faster. What one tolerance measured narrows the brackets of the others.
"""

import math
from collections.abc import Callable

# The search ends where the rise is in [(1 − TOLERANCE)·p, p], or where the bracket is narrower than RESOLUTION of it.
TOLERANCE = 0.01
RESOLUTION = 1e-3
MOST_STEPS = 40


class RiseSearch:
    """Rises measured so far by setting, for a rule whose setting goes from 0, dense, to `most`, everything dropped.

    measure(setting) returns perplexity/dense − 1; step > 0: only multiples of it differ.
    """

    def __init__(self, measure: Callable[[float], float], *, most: float, step: float = 0.0) -> None:
        self._measure, self._most, self._step = measure, most, step
        self.rises: dict[float, float] = {0.0: 0.0}

    def largest(self, p: float) -> float:
        """Returns the setting for a rise of p, measured unless it is 0.

        Rises need not be monotone: it is the last measured setting before the first one whose rise is above p.
        """
        low, high = self._bracket(p)
        if high is None:
            self._add(self._most)
            low, high = self._bracket(p)
        for _ in range(MOST_STEPS):
            if high is None or self.rises[low] >= (1.0 - TOLERANCE) * p or self._narrow(low, high):
                break
            self._add(self._next(low, high, p))
            low, high = self._bracket(p)
        return low

    def _add(self, setting: float) -> None:
        self.rises[setting] = self._measure(setting)
        self.rises = dict(sorted(self.rises.items()))

    def _bracket(self, p: float) -> tuple[float, float | None]:
        low = 0.0
        for setting, rise in self.rises.items():
            # Not <=: a rise that is no number ends the bracket, too.
            if not rise <= p:
                return low, setting
            low = setting
        return low, None

    def _narrow(self, low: float, high: float) -> bool:
        return high - low <= max(1.5 * self._step, RESOLUTION * high)

    def _next(self, low: float, high: float, p: float) -> float:
        first, last, aim = self.rises[low], self.rises[high], (1.0 - TOLERANCE / 2) * p
        if low == 0.0:
            # Small rises grow about as the square of the setting.
            factor = math.sqrt(aim / last) if math.isfinite(last) else 0.5
            setting = high * min(max(factor, 0.02), 0.5)
        else:
            known = first > 0.0 and math.isfinite(last)
            share = math.log(aim / first) / math.log(last / first) if known else 0.5
            setting = low * (high / low) ** min(max(share, 0.1), 0.9)
        if not self._step:
            return setting
        nearest = round(setting / self._step) * self._step
        return min(max(nearest, low + self._step), high - self._step)
