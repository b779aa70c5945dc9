"""act(gate) · up by itself, for a dense down projection: one pass over both, rounded as the modules round.

Sparse products compute it where they read their input, and need no launch for it.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.gpu.common import load_input
from sparsify.kernels.gpu.launch import launch
from sparsify.kernels.gpu.scratch import Scratch

_BLOCK = 1024


@triton.jit
def gate_product(
    gate,  # [T, F]; gate and up may be parts of wider rows
    up,  # [T, F]
    h,  # [T, F]
    stride,
    neurons,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(1)
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = f < neurons
    value = load_input(gate + token * stride, up + token * stride, f, inside, True, ACTIVATION)
    tl.store(h + token * neurons + f, value.to(h.dtype.element_ty), mask=inside)


def run_gate(gate: Tensor, up: Tensor, activation: str, *, scratch: Scratch) -> Tensor:
    """Returns act(gate) · up for both [T, F], with the same stride from row to row."""
    assert gate.stride() == up.stride()
    tokens, neurons = gate.shape
    h = scratch.empty(gate.numel(), gate.dtype).view(tokens, neurons)
    launch(
        gate_product,
        (triton.cdiv(neurons, _BLOCK), tokens),
        gate,
        up,
        h,
        gate.stride(0),
        neurons,
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return h
