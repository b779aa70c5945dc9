"""act(gate) · up by itself, for a dense down projection: one pass over both, rounded as the modules round.

Sparse products compute it where they read their input, and need no launch for it.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparsify.kernels.gpu.common import load_input
from sparsify.kernels.gpu.scratch import Scratch

_BLOCK = 1024


@triton.jit
def gate_product(gate, up, h, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(h + at, load_input(gate, up, at, inside, True, ACTIVATION).to(h.dtype.element_ty), mask=inside)


def run_gate(gate: Tensor, up: Tensor, activation: str, *, scratch: Scratch) -> Tensor:
    """Returns act(gate) · up, [T, F] as both."""
    h = scratch.empty(gate.numel(), gate.dtype).view(gate.shape)
    gate_product[(triton.cdiv(gate.numel(), _BLOCK),)](
        gate, up, h, gate.numel(), ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4
    )
    return h
