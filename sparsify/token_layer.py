"""Layers whose cut depends on the token (sparsify.token_cut): the layers of sparsify.linear with another `keep`.

What is kept goes through the plain reference product; k or z is the `threshold` buffer. Not covered: fast kernels,
which know a fixed threshold only, so these layers refuse every backend but the reference.
"""

import math

from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.kernels.reference import BACKEND, masked_linear, scores
from sparsify.linear import SparseConv1D, SparseLayer, SparseLinear, SparsitySwitch, make_sparse
from sparsify.token_cut import TokenCut, mean_std_mask, top_k_mask


class _TokenCutLayer(SparseLayer):
    def bind(self, name: str | None = None) -> None:
        """Raises SparsifyError for another backend than the reference."""
        if name not in (None, BACKEND.name):
            raise SparsifyError(
                f"backend {name!r} does not run a cut that depends on the token, only {BACKEND.name!r} does: "
                "leave the backend out"
            )
        super().bind(BACKEND.name)

    def _run(self, x: Tensor) -> Tensor | None:
        return masked_linear(x, self.keep(x), self.tensors()) if self.switch.sparse else None


class _TopK(_TokenCutLayer):
    def keep(self, x: Tensor) -> Tensor:
        return top_k_mask(scores(x, self.scale), self.threshold)

    def threshold_problem(self, value: float) -> str | None:
        if not (value.is_integer() and 1 <= value <= self.sparse_in):
            return f"holds k = {value:g}, it must be an integer in [1, {self.sparse_in}]"
        if self.density is not None and round(self.density * self.sparse_in) != value:
            return f"holds k = {value:g} of {self.sparse_in}, its configuration has the density {self.density:g}"
        return None


class _MeanStd(_TokenCutLayer):
    def keep(self, x: Tensor) -> Tensor:
        return mean_std_mask(scores(x, self.scale), self.threshold)

    def threshold_problem(self, value: float) -> str | None:
        # No score of I lies further than √(I − 1) standard deviations from their mean.
        most = math.sqrt(self.sparse_in)
        if abs(value) > most:
            return f"holds z = {value:g}, it must be in [-{most:g}, {most:g}]"
        return None


class TopKLinear(_TopK, SparseLinear):  # type: ignore[misc]
    """nn.Linear [O, I] that uses the k channels of each token with the largest scores."""


class TopKConv1D(_TopK, SparseConv1D):  # type: ignore[misc]
    """Conv1D [I, O] that uses the k channels of each token with the largest scores."""


class MeanStdLinear(_MeanStd, SparseLinear):  # type: ignore[misc]
    """nn.Linear [O, I] that uses the channels whose score is above the token's mean + z·std."""


class MeanStdConv1D(_MeanStd, SparseConv1D):  # type: ignore[misc]
    """Conv1D [I, O] that uses the channels whose score is above the token's mean + z·std."""


_KINDS: dict[TokenCut, tuple[type[SparseLinear], type[SparseConv1D]]] = {
    "top-k": (TopKLinear, TopKConv1D),
    "mean-std": (MeanStdLinear, MeanStdConv1D),
}


def make_layer(
    linear: nn.Module,
    *,
    cut: TokenCut | None,
    scaled: bool,
    rank: int,
    compensated: bool = False,
    switch: SparsitySwitch,
) -> SparseLinear | SparseConv1D:
    """Returns make_sparse's layer for a fixed threshold (cut None), or the one whose cut depends on the token.

    The latter's k or z is still to be set. Raises TypeError for another module than nn.Linear or Conv1D.
    """
    kinds = (SparseLinear, SparseConv1D) if cut is None else _KINDS[cut]
    return make_sparse(linear, scaled=scaled, rank=rank, compensated=compensated, switch=switch, kinds=kinds)
