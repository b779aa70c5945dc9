"""Rotations of a model's activations into their principal components, where few channels hold most of each token.

`eigenbasis` is LaRoSA's Q (arXiv 2507.01299): eigenvectors of XᵀX of calibration activations, the largest first.
`rotate` gives a whole model one Q without another weight: the residual stream is turned, h' = Qᵀh, and every linear
that reads or writes it is turned with it (computational invariance, SliceGPT, arXiv 2401.15024); and the values of each
attention head are, with the columns that read them, so that the output projection's input is. Where we differ:
LaRoSA has a Q for each layer and a product Q_lᵀ Q_{l+1} on the residual stream, which a token pays for. SliceGPT makes
RMSNorms of LayerNorms; here they stay, so the architecture does, and Q keeps the mean that they subtract: Qᵀ1 = 1.
Not covered: decoders other than those of rotation_stream.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.calibration import Calibration, Progress, hooked, run_batches
from sparsify.errors import SparsifyError
from sparsify.linear import SparseLayer, is_linear
from sparsify.rectified import is_rectified
from sparsify.rotation_stream import residual_stream, stream_problem
from sparsify.rotation_weights import turn

# LaRoSA's: a share of the mean of the diagonal of XᵀX, added to the diagonal.
_DAMPING = 0.01
_STREAM = "the residual stream"


def rotate(model: PreTrainedModel, calibration: Calibration, *, progress: Progress | None = None) -> PreTrainedModel:
    """Turns a dense model in place: its residual stream by one Q [D, D], each head of values by an R [H, H] of its own.

    It stays the same function. Q is the eigenbasis of Σ x̂ᵀx̂ over the inputs of all attentions and MLPs, x̂ normalised
    and not yet scaled by the norm's weight; of the mean-free part for LayerNorms. Norm weights are folded into the
    linears behind them and set to 1, LayerNorm biases into theirs where they all have one; a head that is tied to the
    embedding gets a weight of its own, and the configuration says so. R is the eigenbasis of the attention output's
    parts that come from one head of values, which positions do not rotate. Each weight is computed in fp64 and rounded
    once. Returns the model.
    Raises SparsifyError for a converted model and for one that has a rotation_problem.
    """
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise SparsifyError("this model is converted already: rotate the dense model, then convert it")
    refuse_unrotatable(model)
    stream = residual_stream(model)
    norms = {readers.name: readers.norm for readers in stream.readers}
    attentions = {heads.name: heads for heads in stream.attentions}
    modules = norms | {name: heads.output for name, heads in attentions.items()}

    def moment_of(name: str, x: Tensor) -> tuple[str, Tensor]:
        if name in norms:
            return _STREAM, _moment(_normalised(norms[name], x))
        return name, _moments_of_heads(x, attentions[name].size, attentions[name].count)

    moments = _summed(model, modules, calibration, moment_of, progress)
    basis = centred_eigenbasis if stream.is_centred else eigenbasis
    turn(model, stream, basis(moments[_STREAM]), [eigenbasis(moments[name]) for name in attentions])
    return model


def refuse_unrotatable(model: PreTrainedModel) -> None:
    """Raises SparsifyError where `rotate` cannot turn the model."""
    if (reason := rotation_problem(model)) is not None:
        raise SparsifyError(
            f"this model cannot be rotated as a whole, {reason}: use larosa with rotation='layer', or convert without"
        )


def rotation_problem(model: PreTrainedModel) -> str | None:
    """Returns why `rotate` cannot turn the model, in a few words; None where it can."""
    if any(is_rectified(module) and not is_linear(module) for module in model.modules()):
        return "a ReLU stands after its norms, which a rotation does not pass"
    return stream_problem(model)


def second_moments(
    model: PreTrainedModel,
    groups: Mapping[str, Mapping[str, nn.Module]],
    calibration: Calibration,
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Returns XᵀX [I, I] in fp64 of the inputs of each group's modules together, on the whole calibration text.

    Raises SparsifyError where it is not finite.
    """
    modules = {f"{group}\n{name}": module for group, named in groups.items() for name, module in named.items()}
    return _summed(model, modules, calibration, lambda key, x: (key.partition("\n")[0], _moment(x)), progress)


def _summed(
    model: PreTrainedModel,
    modules: dict[str, nn.Module],
    calibration: Calibration,
    moment_of: Callable[[str, Tensor], tuple[str, Tensor]],
    progress: Progress | None,
) -> dict[str, Tensor]:
    """Sums what moment_of(module name, input [T, I] in fp32) returns, by group, over the calibration text."""
    moments: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        group, moment = moment_of(name, x.reshape(-1, x.shape[-1]).float())
        moment = moment.double()
        moments[group] = moments[group] + moment.to(moments[group].device) if group in moments else moment

    with hooked(modules, see):
        run_batches(model, calibration.tokens, "rotate", progress)
    for group, moment in moments.items():
        if not bool(moment.isfinite().all()):
            raise SparsifyError(
                f"the activations of {group} are not finite on the calibration text, so no rotation can be fitted: "
                "check the model in this dtype, or load it in another (--dtype)"
            )
    return moments


def _moment(x: Tensor) -> Tensor:
    return x.T @ x


def _normalised(norm: Any, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def _moments_of_heads(x: Tensor, size: int, count: int) -> Tensor:
    """Returns XᵀX [N, H, H] of the parts of x [T, N·G·H] that come from each head of values."""
    parts = x.view(len(x), count, -1, size).permute(1, 0, 2, 3).flatten(1, 2)
    return parts.mT @ parts


def eigenbasis(moment: Tensor) -> Tensor:
    """Returns Q [..., I, I] in fp64: orthonormal eigenvectors of XᵀX as columns, the largest eigenvalue's first."""
    damping = _DAMPING * moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = moment + damping[..., None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    vectors: Tensor = torch.linalg.eigh(damped).eigenvectors
    return vectors.flip(-1)


def centred_eigenbasis(moment: Tensor) -> Tensor:
    """Returns Q [D, D] in fp64 for XᵀX of rows without a mean, orthonormal, with Qᵀ1 = 1, so that means stay means.

    Q = H·diag(U, 1)·H: H is the reflection that swaps the last unit vector and 1/√D, U the eigenbasis of the moments
    in the rest of its columns, which are orthogonal to 1. Channels are then the D − 1 principal scores but for a part
    that they have in common, their sum over about −D, and the last channel is that sum over √D.
    """
    size = len(moment)
    u = torch.full((size,), -(size**-0.5), dtype=moment.dtype, device=moment.device)
    u[-1] += 1.0
    reflection = torch.eye(size, dtype=moment.dtype, device=moment.device) - 2.0 * torch.outer(u, u) / u.square().sum()
    rest = reflection[:, :-1]
    return rest @ eigenbasis(rest.T @ moment @ rest) @ rest.T + 1.0 / size
