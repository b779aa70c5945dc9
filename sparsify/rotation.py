"""Rotations of a model's activations into their principal components, where few channels hold most of each token.

`eigenbasis` is LaRoSA's Q (arXiv 2507.01299): eigenvectors of XᵀX of calibration activations, the largest first.
`rotate` gives a whole model one Q without another weight: the residual stream is turned, h' = Qᵀh, and every linear
that reads or writes it is turned with it (computational invariance, SliceGPT, arXiv 2401.15024). Where we differ:
LaRoSA has a Q for each layer and a product Q_lᵀ Q_{l+1} on the residual stream, which a token pays for. SliceGPT makes
RMSNorms of LayerNorms; here they stay, so the architecture does, and Q keeps the mean that they subtract: Qᵀ1 = 1.
Not covered: decoders other than those of rotation_stream.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify.calibration import Calibration, Progress, hooked, run_batches
from sparsify.errors import SparsifyError
from sparsify.linear import SparseLayer
from sparsify.rotation_stream import Readers, ResidualStream, folds_bias, residual_stream, shift_of, stream_problem
from sparsify.targets import dense_weight

# LaRoSA's: a share of the mean of the diagonal of XᵀX, added to the diagonal.
_DAMPING = 0.01


def rotate(model: PreTrainedModel, calibration: Calibration, *, progress: Progress | None = None) -> PreTrainedModel:
    """Turns the residual stream of a dense model in place by one Q [D, D] and returns it: the same function, rotated.

    Q is the eigenbasis of Σ x̂ᵀx̂ over the inputs of all attentions and MLPs, x̂ normalised and not yet scaled by the
    norm's weight; of the mean-free part for LayerNorms. Norm weights are folded into the linears behind them and set to
    1, LayerNorm biases into theirs where they all have one; a head that is tied to the embedding gets a weight of its
    own, and the configuration says so. Each weight is computed in fp64 and rounded once.
    Raises SparsifyError for a converted model and for one that has a rotation_problem.
    """
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise SparsifyError("this model is converted already: rotate the dense model, then convert it")
    if (reason := rotation_problem(model)) is not None:
        raise SparsifyError(
            f"this model cannot be rotated as a whole, {reason}: use larosa with rotation='layer', or convert without"
        )
    stream = residual_stream(model)
    norms = {readers.name: readers.norm for readers in stream.readers}
    moment = second_moments(model, {"all": norms}, calibration, normalised=True, progress=progress)["all"]
    _turn(model, stream, centred_eigenbasis(moment) if stream.is_centred else eigenbasis(moment))
    return model


def rotation_problem(model: PreTrainedModel) -> str | None:
    """Returns why `rotate` cannot turn the model, in a few words; None where it can."""
    return stream_problem(model)


def second_moments(
    model: PreTrainedModel,
    groups: Mapping[str, Mapping[str, nn.Module]],
    calibration: Calibration,
    *,
    normalised: bool = False,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Returns XᵀX [I, I] in fp64 of the inputs of each group's modules together, on the whole calibration text.

    normalised: of what the modules, RMSNorms or LayerNorms, make of x before weight and bias, in the place of x.
    Raises SparsifyError where it is not finite.
    """
    modules = {f"{group}\n{name}": module for group, named in groups.items() for name, module in named.items()}
    moments: dict[str, Tensor] = {}

    def see(key: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if normalised:
            x = _normalised(modules[key], x)
        group, moment = key.partition("\n")[0], (x.T @ x).double()
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


def _normalised(norm: Any, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def eigenbasis(moment: Tensor) -> Tensor:
    """Returns Q [I, I] in fp64: orthonormal eigenvectors of XᵀX as columns, the largest eigenvalue's first."""
    damping = _DAMPING * moment.diagonal().mean()
    damped = moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
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


@torch.no_grad()
def _turn(model: PreTrainedModel, stream: ResidualStream, q: Tensor) -> None:
    _untie(model)
    for embedding in stream.embeddings:
        _set(embedding.weight, embedding.weight.double() @ q.to(embedding.weight.device))
    for readers in (*stream.readers, stream.head):
        if stream.is_centred:
            _take_bias(readers, q)
        for linear in readers.linears:
            # W ← W·diag(γ)·Q
            weight = dense_weight(linear)
            _set_dense(linear, (weight.double() * readers.norm.weight.double()) @ q.to(weight.device))
        _set(readers.norm.weight, torch.ones_like(readers.norm.weight))
    for linear in stream.writers:
        # W ← Qᵀ·W, b ← Qᵀ·b
        weight = dense_weight(linear)
        _set_dense(linear, q.to(weight.device).T @ weight.double())
        if linear.bias is not None:
            _set(linear.bias, q.to(linear.bias.device).T @ linear.bias.double())


def _take_bias(readers: Readers, q: Tensor) -> None:
    """b ← b + W·β and β ← 0 where all readers have a b, else β ← Qᵀ(β/γ)."""
    norm = readers.norm
    if not folds_bias(readers):
        _set(norm.bias, q.to(norm.bias.device).T @ shift_of(norm))
        return
    for linear in readers.linears:
        _set(linear.bias, linear.bias.double() + dense_weight(linear).double() @ norm.bias.double())
    _set(norm.bias, torch.zeros_like(norm.bias))


def _untie(model: Any) -> None:
    if model.lm_head.weight is model.get_input_embeddings().weight:
        weight = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _set_dense(linear: nn.Module, value: Tensor) -> None:
    """Sets the weight to value [O, I], whichever way round the module stores it."""
    weight: Any = linear.weight
    _set(weight, value.T if isinstance(linear, Conv1D) else value)


def _set(parameter: Tensor, value: Tensor) -> None:
    # A new tensor: what was mapped from a file is not written to, and what points to the old one notices.
    parameter.data = value.to(parameter.dtype).contiguous()
