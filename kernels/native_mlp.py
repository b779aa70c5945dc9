"""The gated MLP, down(act(gate x) · up x), in one call of the native library.

The product is rounded to the dtype as a module would; with `relu` (and `cut`, FATReLU: act(g) = g where g > cut, else
0) and a row-major up, up's rows are computed only for the neurons whose gate is not 0: one token reads only those rows
and the columns of down that belong to them. Not covered: more than 8 tokens, activations without a name here,
gradients.
"""

from ctypes import byref

import torch
from torch import Tensor

from sparsify.errors import SparsifyError, UnavailableError, suggest
from sparsify.kernels import library
from sparsify.kernels.native import checked, rows_of
from sparsify.kernels.spec import SparseTensors
from sparsify.kernels.torch_operator import needs_grad


def gated_mlp(
    x: Tensor, gate: SparseTensors, up: SparseTensors, down: SparseTensors, *, activation: str, cut: float = 0.0
) -> Tensor:
    """Returns y [..., D] for x [..., I] of at most 8 tokens; gate and up are [F, I], down is [D, F].

    activation: silu, gelu, gelu_pytorch_tanh or relu, with a cut for relu only. Raises SparsifyError for tensors
    that do not fit together, that the kernels cannot take, or that need a gradient.
    """
    native = library.load()
    if native is None:
        raise UnavailableError(str(library.missing()))
    if activation not in library.ACTIVATIONS:
        known = ", ".join(library.ACTIVATIONS)
        raise SparsifyError(
            f"unknown activation {activation!r}: there are {known}.{suggest(activation, library.ACTIVATIONS)}"
        )
    if cut and activation != "relu":
        raise SparsifyError(f"a cut of {cut} is for relu (FATReLU), not for {activation}")
    if torch.is_grad_enabled() and needs_grad(x, (gate, up, down)):
        raise SparsifyError("the gated MLP in one call has no gradients: call it under torch.no_grad()")
    rows = rows_of(x)
    tokens, inputs = rows.shape
    gate_part, up_part = (checked(x.dtype, inputs, t) for t in (gate, up))
    neurons = gate_part.outputs
    if up_part.outputs != neurons:
        raise SparsifyError(f"gate has {neurons} neurons, up has {up_part.outputs}")
    down_part = checked(x.dtype, neurons, down)
    if not 1 <= tokens <= library.MAX_TOKENS:
        raise SparsifyError(f"the gated MLP takes 1 to {library.MAX_TOKENS} tokens, not {tokens}")
    y = torch.empty(tokens, down_part.outputs, dtype=x.dtype)
    status = native.sp_mlp(
        library.DTYPES[x.dtype],
        library.ACTIVATIONS[activation],
        cut,
        rows.data_ptr(),
        inputs,
        tokens,
        *(byref(linear) for linear in (gate_part, up_part, down_part)),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError("the native kernels got no work memory")
    return y.view(*x.shape[:-1], y.shape[1])
