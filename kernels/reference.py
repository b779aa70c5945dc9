"""Plain PyTorch kernels: what every other backend must equal, on any device and shape.

They save no bytes: the mask is applied to the input and the product is dense. Row-major weights are kept,
because torch's own matmul on channel-contiguous bf16 weights is tens of times slower on a CPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.kernels.spec import Backend, SparseTensors


def scores(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns |x| · scale in fp32, the shape of x [..., I]."""
    score = x.float().abs()
    return score if scale is None else score * scale


def keep_mask(x: Tensor, threshold: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns the channels that are used, bool, the shape of x [..., I].

    keep = ¬(|x| · scale ≤ threshold) in fp32, whatever x's dtype: a bf16 comparison would round the threshold.
    The cut is strict, and written so that a NaN is kept and reaches the output as in a dense linear.
    """
    return ~(scores(x, scale) <= threshold)


def sparse_linear(x: Tensor, t: SparseTensors) -> Tensor:
    """Returns y [..., O] = W (x ⊙ keep) + B A (x ⊙ ¬keep) + b, the paper's form (arXiv 2504.19449, eq. 3)."""
    return masked_linear(x, keep_mask(x, t.threshold, t.scale), t)


def masked_linear(x: Tensor, keep: Tensor, t: SparseTensors) -> Tensor:
    """Returns the same y for channels that were chosen already: keep is bool, the shape of x [..., I]."""
    y = F.linear(torch.where(keep, x, 0.0), t.weight, t.bias)
    if t.lr_a is not None and t.lr_b is not None:
        y = y + F.linear(F.linear(torch.where(keep, 0.0, x), t.lr_a), t.lr_b)
    return y


def residual_tensors(t: SparseTensors) -> SparseTensors:
    """Returns t with R = W − BA in the place of W, computed in fp64 and rounded once to W's dtype."""
    if t.lr_a is None or t.lr_b is None:
        return t
    residual = (t.weight.double() - t.lr_b.double() @ t.lr_a.double()).to(t.weight.dtype)
    return SparseTensors(residual, t.bias, t.threshold, t.scale, t.lr_a, t.lr_b)


def sparse_linear_residual(x: Tensor, t: SparseTensors) -> Tensor:
    """Returns the same y from residual_tensors: y = R (x ⊙ keep) + B A x + b.

    W x_S + L (x − x_S) = (W − L) x_S + L x exactly. The low-rank branch needs no mask, so one sparse GEMV can do
    both: its rows are R's active columns and, always active, B's.
    """
    keep = keep_mask(x, t.threshold, t.scale)
    y = F.linear(torch.where(keep, x, 0.0), t.weight, t.bias)
    if t.lr_a is not None and t.lr_b is not None:
        y = y + F.linear(F.linear(x, t.lr_a), t.lr_b)
    return y


def _run(x: Tensor, site: Sequence[SparseTensors]) -> list[Tensor]:
    return [sparse_linear(x, tensors) for tensors in site]


def _supports(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> bool:
    return True


BACKEND = Backend(name="reference", priority=0, channel_contiguous=False, supports=_supports, run=_run)
