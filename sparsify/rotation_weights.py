"""Turning a model's weights by given rotations: the same function, each weight computed in fp64 and rounded once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify.rotation_stream import Heads, Readers, ResidualStream, folds_bias, shift_of
from sparsify.targets import dense_weight

# The attention of a linear, and R of its heads.
_Bases = Mapping[nn.Module, tuple[Heads, Tensor]]


@torch.no_grad()
def turn(model: PreTrainedModel, stream: ResidualStream, q: Tensor, heads: Sequence[Tensor]) -> None:
    """Turns the model in place: h' = Qᵀh for its stream, v' = Rᵀv for values.

    q [D, D] in fp64, with Qᵀ1 = 1 where the stream is_centred; heads: R [N, H, H] in fp64 of each of its attentions.
    """
    bases = list(zip(stream.attentions, heads, strict=True))
    values: _Bases = {attention.values: (attention, r) for attention, r in bases}
    outputs: _Bases = {attention.output: (attention, r) for attention, r in bases}
    _untie(model)
    for embedding in stream.embeddings:
        _set(embedding.weight, embedding.weight.double() @ q.to(embedding.weight.device))
    for readers in (*stream.readers, stream.head):
        _turn_readers(readers, q, values)
    for linear in stream.writers:
        _turn_writer(linear, q, outputs)


def _turn_readers(readers: Readers, q: Tensor, values: _Bases) -> None:
    """W ← W·diag(γ)·Q, γ ← 1; b ← b + W·β, β ← 0 where all readers have a b, else β ← Qᵀ(β/γ).

    Then Rᵀ before the rows of values.
    """
    norm = readers.norm
    centred = isinstance(norm, nn.LayerNorm)
    folds = centred and folds_bias(readers)
    for linear in readers.linears:
        weight, bias = _exact(linear)
        if folds:
            assert bias is not None
            bias = bias + weight @ norm.bias.double()
        weight = (weight * norm.weight.double()) @ q.to(weight.device)
        if linear in values:
            attention, r = values[linear]
            weight = _turn_rows(weight, attention, r.to(weight.device))
            bias = None if bias is None else _turn_rows(bias[:, None], attention, r.to(bias.device))[:, 0]
        _store(linear, weight, bias)
    if centred:
        shift = shift_of(norm)
        _set(norm.bias, torch.zeros_like(shift) if folds else q.to(shift.device).T @ shift)
    _set(norm.weight, torch.ones_like(norm.weight))


def _turn_writer(linear: nn.Module, q: Tensor, outputs: _Bases) -> None:
    """W ← Qᵀ·W, b ← Qᵀ·b; W·R where it reads values."""
    weight, bias = _exact(linear)
    q = q.to(weight.device)
    weight = q.T @ weight
    if linear in outputs:
        attention, r = outputs[linear]
        parts = weight.view(len(weight), attention.count, -1, attention.size)
        weight = torch.einsum("dngh,nhk->dngk", parts, r.to(weight.device)).reshape(weight.shape)
    _store(linear, weight, None if bias is None else q.T @ bias)


def _turn_rows(weight: Tensor, attention: Heads, r: Tensor) -> Tensor:
    """Returns weight [O, I] with Rᵀ before the rows of values, by head."""
    parts = weight[attention.first :].view(attention.count, attention.size, -1)
    return torch.cat((weight[: attention.first], (r.mT @ parts).flatten(0, 1)))


def _untie(model: Any) -> None:
    if model.lm_head.weight is model.get_input_embeddings().weight:
        weight = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _exact(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Returns weight [O, I] and bias [O] in fp64."""
    return dense_weight(linear).double(), None if linear.bias is None else linear.bias.double()


def _store(linear: Any, weight: Tensor, bias: Tensor | None) -> None:
    _set(linear.weight, weight.T if isinstance(linear, Conv1D) else weight)
    if bias is not None:
        _set(linear.bias, bias)


def _set(parameter: Tensor, value: Tensor) -> None:
    # A new tensor: what was mapped from a file is not written to, and what points to the old one notices.
    parameter.data = value.to(parameter.dtype).contiguous()
