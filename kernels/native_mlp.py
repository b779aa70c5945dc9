"""The gated MLP, down(act(gate x) · up x), in one call of the native library.

The product is rounded to the dtype as a module would; with `relu` (and `cut`, FATReLU: act(g) = g where g > cut, else
0) and a row-major up, up's rows are computed only for the neurons whose gate is not 0: one token reads only those rows
and the columns of down that belong to them. Not covered: more than 8 tokens, activations without a name here.
"""

from ctypes import byref

import torch
from torch import Tensor

from sparsify.errors import SparsifyError, UnavailableError, suggest
from sparsify.kernels import library
from sparsify.kernels.native import checked
from sparsify.kernels.spec import SparseTensors


def gated_mlp(
    x: Tensor, gate: SparseTensors, up: SparseTensors, down: SparseTensors, *, activation: str, cut: float = 0.0
) -> Tensor:
    """Returns y [..., D] for x [..., I] of at most 8 tokens; gate and up are [F, I], down is [D, F].

    activation: silu, gelu, gelu_pytorch_tanh or relu, with a cut for relu only. Raises SparsifyError for tensors
    that do not fit together or that the kernels cannot take.
    """
    native = library.load()
    if native is None:
        raise UnavailableError(str(library.missing()))
    inputs, neurons = x.shape[-1], gate.weight.shape[0]
    tokens = x.numel() // max(inputs, 1)
    if activation not in library.ACTIVATIONS:
        known = ", ".join(library.ACTIVATIONS)
        raise SparsifyError(
            f"unknown activation {activation!r}: there are {known}.{suggest(activation, library.ACTIVATIONS)}"
        )
    if cut and activation != "relu":
        raise SparsifyError(f"a cut of {cut} is for relu (FATReLU), not for {activation}")
    if up.weight.shape[0] != neurons:
        raise SparsifyError(f"gate has {neurons} neurons, up has {up.weight.shape[0]}")
    if not 1 <= tokens <= library.MAX_TOKENS:
        raise SparsifyError(f"the gated MLP takes 1 to {library.MAX_TOKENS} tokens, not {tokens}")
    linears = [checked(x.dtype, size, t) for t, size in ((gate, inputs), (up, inputs), (down, neurons))]
    rows = x.detach().reshape(tokens, inputs).contiguous()
    y = torch.empty(tokens, down.weight.shape[0], dtype=x.dtype)
    status = native.sp_mlp(
        library.DTYPES[x.dtype],
        library.ACTIVATIONS[activation],
        cut,
        rows.data_ptr(),
        inputs,
        tokens,
        *(byref(linear) for linear in linears),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError("the native kernels got no work memory")
    return y.view(*x.shape[:-1], y.shape[1])
