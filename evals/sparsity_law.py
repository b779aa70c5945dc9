"""The sparsity law of ProSparse, fitted: S(λ) = 100 − exp(−a·λᵇ + c), in percent (arXiv 2402.13516, section 5).

For 7B the paper has a 1.76, b 0.30, c 3.49, with λ its last stage's factor. Ours is another λ wherever the reduction
of the L1 term or the size of activations is another, so only the form compares. Not covered: the cost in perplexity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsify.errors import SparsifyError

_EXPONENTS = np.linspace(0.02, 3.0, 1491)


@dataclass(frozen=True)
class SparsityLaw:
    """S(λ) = 100 − exp(−a·λᵇ + c); error: root mean square over the points, in points of percent."""

    a: float
    b: float
    c: float
    error: float

    def at(self, factor: float) -> float:
        """Returns the sparsity in percent."""
        return float(100.0 - np.exp(-self.a * factor**self.b + self.c))


def fit_law(factors: Sequence[float], sparsities: Sequence[float]) -> SparsityLaw:
    """Fits the law to sparsities in percent, by least squares in the sparsity's own units.

    For each exponent b of a fine grid, a and c are linear in log(100 − S); of these the fit with the least error in S
    is taken. Raises SparsifyError for fewer than four different factors (there are three unknowns), and for a
    sparsity of 100% or more.
    """
    x, s = np.asarray(factors, dtype=np.float64), np.asarray(sparsities, dtype=np.float64)
    if len(set(factors)) < 4 or len(x) != len(s):
        raise SparsifyError(f"the law has three unknowns: {len(set(factors))} factors were given, it takes at least 4")
    if not bool((s < 100.0).all()) or not bool((x >= 0.0).all()):
        raise SparsifyError("the law is for factors of at least 0 and sparsities below 100%")
    best: SparsityLaw | None = None
    # Weights make the least squares of the logarithm, to first order, those of the sparsity itself.
    weight = 100.0 - s
    for b in _EXPONENTS:
        columns = np.stack([-(x**b), np.ones_like(x)], axis=1)
        (a, c), *_ = np.linalg.lstsq(columns * weight[:, None], np.log(100.0 - s) * weight, rcond=None)
        error = float(np.sqrt(np.mean((100.0 - np.exp(-a * x**b + c) - s) ** 2)))
        if best is None or error < best.error:
            best = SparsityLaw(float(a), float(b), float(c), error)
    assert best is not None
    return best
