"""Layers whose cut depends on the token (sparsify.token_cut): the layers of sparsify.linear with another `keep`.

What is kept goes through the plain reference product; k or z is the `threshold` buffer. A layer may cut Qᵀx in the
place of x: Q is stored once for the linears of an input site, in the first of them. Not covered: fast kernels, which
know a fixed threshold on x only, so these layers refuse every backend but the reference.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.kernels.reference import BACKEND, masked_linear, scores
from sparsify.linear import SparseConv1D, SparseLayer, SparseLinear, SparsitySwitch, make_sparse
from sparsify.token_cut import TokenCut, k_problem, mean_std_mask, top_k_mask


class _TokenCutLayer(SparseLayer):
    def bind(self, name: str | None = None) -> None:
        """Raises SparsifyError for another backend than the reference."""
        if name not in (None, BACKEND.name):
            raise SparsifyError(
                f"backend {name!r} does not run a cut that depends on the token, only {BACKEND.name!r} does: "
                "leave the backend out"
            )
        super().bind(BACKEND.name)

    def splits(self, by: str) -> bool:
        """Not by inputs: a k, a mean or a rotation is of all the channels."""
        return by == "outputs"

    def _run(self, x: Tensor) -> Tensor | None:
        return masked_linear(x, self.keep(x), self.tensors()) if self.switch.sparse else None


class _TopK(_TokenCutLayer):
    def keep(self, x: Tensor) -> Tensor:
        return top_k_mask(scores(x, self.scale), self.threshold)

    def threshold_problem(self, value: float) -> str | None:
        return k_problem(value, self.sparse_in, self.density)


class _RotatedTopK(_TopK):
    """y = W·Q·topk(Qᵀx) + b. Computed as W (Q topk(Qᵀx)): no second copy W·Q of a weight is held."""

    rotation: Tensor
    lends_buffers = True
    # The layer of its site that stores Q, in a tuple: not one of this layer's modules.
    _owner: "tuple[_RotatedTopK, ...]" = ()

    def link(self, owner: "_RotatedTopK") -> None:
        """Uses the owner's Q; the owner itself stores one, the identity until it is set or loaded."""
        if owner is not self:
            self._owner = (owner,)
            return
        like = self.weight
        self.register_buffer("rotation", torch.eye(self.sparse_in, dtype=like.dtype, device=like.device))

    def _basis(self, x: Tensor) -> Tensor:
        owner = self._owner[0] if self._owner else self
        return owner.rotation.to(x.device)

    def keep(self, x: Tensor) -> Tensor:
        """Returns the channels of Qᵀx that a sparse forward uses, bool, the shape of x [..., I]."""
        return super().keep(x @ self._basis(x))

    def _run(self, x: Tensor) -> Tensor | None:
        if not self.switch.sparse:
            return None
        t = self.tensors()
        return F.linear(rotated_part(x, self._basis(x), self.threshold), t.weight, t.bias)


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


class RotatedTopKLinear(_RotatedTopK, SparseLinear):  # type: ignore[misc]
    """nn.Linear [O, I] that uses the k channels of each token's Qᵀx with the largest magnitudes."""


class RotatedTopKConv1D(_RotatedTopK, SparseConv1D):  # type: ignore[misc]
    """Conv1D [I, O] that uses the k channels of each token's Qᵀx with the largest magnitudes."""


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
    rotated: bool = False,
    switch: SparsitySwitch,
) -> SparseLinear | SparseConv1D:
    """Returns make_sparse's layer for a fixed threshold (cut None), or the one whose cut depends on the token.

    The latter's k or z is still to be set; a rotated one is still to be linked to its rotation (link_rotations).
    Raises TypeError for another module than nn.Linear or Conv1D.
    """
    kinds = (SparseLinear, SparseConv1D) if cut is None else _KINDS[cut]
    if rotated:
        kinds = (RotatedTopKLinear, RotatedTopKConv1D)
    return make_sparse(linear, scaled=scaled, rank=rank, compensated=compensated, switch=switch, kinds=kinds)


def link_rotations(layers: Mapping[str, nn.Module], rotations: Mapping[str, str]) -> None:
    """Gives rotated layers the Q of the layer that stores it; rotations: {layer: the one that stores its Q}."""
    for name, owner in rotations.items():
        layer, storing = layers[name], layers[owner]
        assert isinstance(layer, _RotatedTopK)
        assert isinstance(storing, _RotatedTopK)
        layer.link(storing)


def rotated_part(x: Tensor, rotation: Tensor, k: Tensor) -> Tensor:
    """Returns Q topk(Qᵀx), the part of x [..., I] that is used; rotation [I, I] is Q."""
    z = x @ rotation
    return torch.where(top_k_mask(scores(z), k), z, 0.0) @ rotation.T


def is_rotation(q: Tensor) -> bool:
    """Whether QᵀQ is the identity up to the rounding of its dtype, on a few random directions."""
    # On the CPU, as values that are read from a file are: a default device may be set while a model is loaded.
    generator = torch.Generator("cpu").manual_seed(0)
    probes = torch.randn(len(q), 8, generator=generator, dtype=torch.float64, device="cpu")
    error = (q.double().T @ (q.double() @ probes) - probes).norm() / probes.norm()
    return bool(error < 0.02)
