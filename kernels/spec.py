"""What a kernel is given: the tensors of one linear, and the backend that runs them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTensors:
    """The tensors of one activation-sparse linear.

    y = W (x ⊙ keep) + B A (x ⊙ ¬keep) + b,  keep_j = ¬(|x_j| · scale_j ≤ threshold), compared in fp32.

    weight [O, I] is W (or W − BA for the residual form), in any strides; bias [O] or None; threshold [] fp32;
    scale [I] fp32 or None (all ones); lr_a [R, I] is A and lr_b [O, R] is B, both or neither.
    density is the share of channels that calibration text kept: a hint for choosing a kernel, never part of the result.
    """

    weight: Tensor
    bias: Tensor | None
    threshold: Tensor
    scale: Tensor | None = None
    lr_a: Tensor | None = None
    lr_b: Tensor | None = None
    density: float | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation of the sparse linear.

    run takes the input [..., I] of one site and the tensors of every linear that shares it, and returns their
    outputs [..., O_k] in order: one call an input site. A backend must be right for any number of tokens.
    """

    name: str
    # Higher is tried first.
    priority: int
    # True: weights are re-strided once, in place of the row-major ones, so that W[:, j] is contiguous.
    channel_contiguous: bool
    supports: Callable[[torch.device, torch.dtype, int, int], bool]
    run: Callable[[Tensor, Sequence[SparseTensors]], list[Tensor]]
    # What this installation lacks for the backend to support this device and dtype, in one line; None where it lacks
    # nothing, or where they are not the backend's.
    missing: Callable[[torch.device, torch.dtype], str | None] | None = None
