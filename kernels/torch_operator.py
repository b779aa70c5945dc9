"""A backend's linear as a torch operator: for torch.compile, by a shape function, and for training, by its gradients.

Elsewhere a backend skips the operator: it costs tens of microseconds a call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.kernels.reference import keep_mask
from sparsify.kernels.spec import SparseTensors

Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


def linear_operator(name: str, run: Callable[[Tensor, SparseTensors], Tensor]) -> Linear:
    """Registers run(x [..., I], tensors) → [..., O] as the operator sparsify::name and returns it."""

    def linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        scale: Tensor | None,
        lr_a: Tensor | None,
        lr_b: Tensor | None,
    ) -> Tensor:
        return run(x, SparseTensors(weight, bias, threshold, scale, lr_a, lr_b))

    operator = torch.library.custom_op(f"sparsify::{name}", linear, mutates_args=())
    operator.register_fake(_shape)
    operator.register_autograd(_backward, setup_context=_save)
    return operator


def by_operator(operator: Linear, x: Tensor, site: Sequence[SparseTensors]) -> list[Tensor] | None:
    """Returns the outputs of a site's linears by their operator where they are compiled or trained; None elsewhere."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and needs_grad(x, site)):
        return [operator(x, t.weight, t.bias, t.threshold, t.scale, t.lr_a, t.lr_b) for t in site]
    return None


def needs_grad(x: Tensor, site: Sequence[SparseTensors]) -> bool:
    """Returns whether the input or a tensor of the site is trained."""
    trained = (t for tensors in site for t in (tensors.weight, tensors.bias, tensors.lr_a, tensors.lr_b))
    return x.requires_grad or any(t is not None and t.requires_grad for t in trained)


def _shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    scale: Tensor | None,
    lr_a: Tensor | None,
    lr_b: Tensor | None,
) -> Tensor:
    # It answers too where only one of them is on meta: outputs that nobody computes.
    for other in (weight, bias, threshold, scale, lr_a, lr_b):
        if other is not None and other.device != x.device:
            raise SparsifyError(f"the input is on {x.device}, a tensor of its linear on {other.device}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The mask is constant almost everywhere: gradients flow through what was kept, and through B A for the rest."""
    x, weight, bias, threshold, scale, lr_a, lr_b = ctx.saved_tensors
    rows = x.reshape(-1, x.shape[-1])
    g = grad.reshape(len(rows), grad.shape[-1])
    kept = keep_mask(rows, threshold, scale)
    grad_x = torch.where(kept, g @ weight, 0.0)
    grad_a = grad_b = None
    if lr_a is not None:
        rest = torch.where(kept, 0.0, rows)
        inner = g @ lr_b
        grad_x = grad_x + torch.where(kept, 0.0, inner @ lr_a)
        grad_a, grad_b = inner.t() @ rest, g.t() @ (rest @ lr_a.t())
    grad_weight = g.t() @ torch.where(kept, rows, 0.0)
    grad_bias = g.sum(0) if bias is not None else None
    return grad_x.view_as(x), grad_weight, grad_bias, None, None, grad_a, grad_b
