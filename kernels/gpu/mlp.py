"""The gated MLP, down(act(gate x) · up x), on the GPU for 1 to 8 tokens.

Two launches: gate|up, and down, which computes act(gate) · up where it reads it. With `relu` and a row-major up, one
token: gate, the list of its neurons above the cut, only their rows of up, and their columns of down. Values are rounded
where the modules would round them. Not covered: gradients, more than 8 tokens.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from sparsify.errors import SparsifyError, suggest
from sparsify.kernels.gpu.launch import launch
from sparsify.kernels.gpu.rows import relu_rows
from sparsify.kernels.gpu.scratch import Scratch, scratch_of
from sparsify.kernels.gpu.site import ACTIVATIONS, checked, few_rows, on_device, run_linears, run_select, run_site
from sparsify.kernels.gpu.tiles import MOST_TOKENS, Table, table_of
from sparsify.kernels.spec import SparseTensors
from sparsify.kernels.torch_operator import needs_grad

_BLOCK_F, _BLOCK_K = 4, 512
# Programs for rows of up: enough for every device, each takes the blocks that are left.
_PROGRAMS = 1024


def gated_mlp(
    x: Tensor, gate: SparseTensors, up: SparseTensors, down: SparseTensors, *, activation: str, cut: float = 0.0
) -> Tensor:
    """Returns y [..., D] for x [..., I] of 1 to 8 tokens; gate and up are [F, I], down is [D, F].

    activation: silu, gelu, gelu_pytorch_tanh or relu, with a cut for relu only (FATReLU: act(g) = g where g > cut, else
    0). A row-major up, for relu and one token, is read only where the gate is not 0. Raises SparsifyError for tensors
    that do not fit together, that the kernels cannot take, or that need a gradient.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise SparsifyError(f"unknown activation {activation!r}: there are {known}.{suggest(activation, ACTIVATIONS)}")
    if cut and activation != "relu":
        raise SparsifyError(f"a cut of {cut} is for relu (FATReLU), not for {activation}")
    if not cut >= 0:
        raise SparsifyError(f"the cut is {cut}, it must be at least 0")
    if torch.is_grad_enabled() and needs_grad(x, (gate, up, down)):
        raise SparsifyError("the gated MLP has no gradients: call it under torch.no_grad()")
    rows = few_rows(x)
    if rows is None or not len(rows):
        raise SparsifyError(f"the gated MLP takes 1 to {MOST_TOKENS} tokens, not {x.numel() // x.shape[-1]}")
    by_rows = activation == "relu" and len(rows) == 1 and up.weight.dim() == 2 and up.weight.is_contiguous()
    by_rows = by_rows and up.lr_a is None
    checked(rows, gate)
    checked(rows, up, by_rows=by_rows)
    neurons = gate.weight.shape[0]
    if up.weight.shape[0] != neurons:
        raise SparsifyError(f"gate has {neurons} neurons, up has {up.weight.shape[0]}")
    checked(rows.new_empty(1, neurons), down)
    scratch, table = scratch_of(x.device), table_of(x.device)
    with on_device(x.device):
        if by_rows:
            y = relu_mlp(rows, gate, up, down, cut, scratch=scratch, table=table)
        else:
            g, u = run_linears(rows, (gate, up), scratch=scratch, table=table)
            if cut:
                g = torch.where(g.float() <= cut, torch.zeros((), dtype=g.dtype, device=g.device), g)
            y = run_site(g, (down,), up=u, activation=activation, scratch=scratch, table=table)[0]
    return y.view(*x.shape[:-1], y.shape[1])


def relu_mlp(
    x: Tensor,
    gate: SparseTensors,
    up: SparseTensors,
    down: SparseTensors,
    cut: float,
    *,
    scratch: Scratch,
    table: Table,
) -> Tensor:
    """Returns y [1, D] of one token x [1, I], up [F, I] row-major: only the rows of neurons that are on are read."""
    g = run_site(x, (gate,), scratch=scratch, table=table)[0]
    h = scratch.empty(g.shape[1], g.dtype)
    limit = torch.full((), cut, dtype=torch.float32, device=x.device)
    lists = run_select(
        g, (replace(gate, threshold=limit, scale=None, lr_a=None, lr_b=None),), scratch=scratch, relu=True, clear=h
    )
    assert lists is not None
    channels = x.shape[1]
    launch(
        relu_rows,
        (min(_PROGRAMS, triton.cdiv(g.shape[1], _BLOCK_F)),),
        x, g, lists.index, lists.count, up.weight, up.bias, h, up.threshold, up.scale, channels,
        BIASED=up.bias is not None, SCALED=up.scale is not None,
        BLOCK_F=_BLOCK_F, BLOCK_K=min(_BLOCK_K, triton.next_power_of_2(channels)), num_warps=4,
    )  # fmt: skip
    # Neurons that are off have an input of 0: down can need none but the others, if its own threshold lets them.
    return run_site(h.view(1, -1), (down,), scratch=scratch, table=table, lists=lists, recheck=True)[0]
