"""The native CPU backend: thresholded sparse GEMV over channel-contiguous weights, fp32, bf16 and fp16.

A few tokens: score, compaction, product, low-rank rest and bias in one call of the C library for a whole site, reading
only the weight rows that some token keeps. Many tokens: the mask on the input and one product by BLAS, where every
weight is read anyway. Sums are in fp32 and rounded once; the same threads give the same bits. Gradients flow, by plain
torch products. Not covered: other devices, fp64, inputs that are not on the CPU.
"""

from collections.abc import Sequence
from ctypes import c_void_p
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.kernels import library
from sparsify.kernels.reference import keep_mask
from sparsify.kernels.spec import Backend, SparseTensors
from sparsify.kernels.torch_operator import by_operator, linear_operator

# Above this many tokens BLAS is faster than groups of 8 tokens through the kernel (2048×5632 on 2 cores: with bf16
# products in the processor from about 12 tokens, else from about 100).
_BLAS_FROM = 12
_WIDENED_BLAS_FROM = 96
# Channels widened to fp32 at once where BLAS has no product in the weights' dtype.
_BLOCK = 512


def run(x: Tensor, site: Sequence[SparseTensors]) -> list[Tensor]:
    """Returns the outputs [..., O_k] of the linears of one site for x [..., I].

    Raises SparsifyError for tensors that the kernels cannot take: another dtype, device, shape or layout.
    """
    outputs = by_operator(native_linear, x, site)
    return _run(x, site) if outputs is None else outputs


def _run(x: Tensor, site: Sequence[SparseTensors]) -> list[Tensor]:
    rows = rows_of(x)
    tokens, inputs = rows.shape
    linears = [checked(x.dtype, inputs, tensors) for tensors in site]
    if tokens >= (_BLAS_FROM if _has_product(x.dtype) else _WIDENED_BLAS_FROM):
        return [_many_tokens(x, tensors) for tensors in site]
    outputs = [torch.empty(tokens, t.weight.shape[0], dtype=x.dtype) for t in site]
    for start in range(0, len(site), library.MAX_SITE):
        few_tokens(rows, linears[start : start + library.MAX_SITE], outputs[start : start + library.MAX_SITE])
    return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]


def few_tokens(rows: Tensor, linears: list[library.CLinear], outputs: list[Tensor]) -> None:
    """Writes the outputs [T, O_k] of at most MAX_SITE linears, each as `checked` gave it, for rows [T, I]."""
    native = library.load()
    assert native is not None
    array = (library.CLinear * len(linears))(*linears)
    dtype, threads, size = library.DTYPES[rows.dtype], torch.get_num_threads(), rows.element_size()
    for first in range(0, len(rows), library.MAX_TOKENS):
        tokens = min(library.MAX_TOKENS, len(rows) - first)
        pointers = (c_void_p * len(outputs))(*(y.data_ptr() + first * y.shape[1] * size for y in outputs))
        x = rows.data_ptr() + first * rows.shape[1] * size
        status = native.sp_site(dtype, x, rows.shape[1], tokens, array, len(linears), pointers, threads)
        if status:
            raise MemoryError("the native kernels got no work memory")


def _many_tokens(x: Tensor, t: SparseTensors) -> Tensor:
    """As the reference computes it, with products that suit channel-contiguous weights."""
    keep = keep_mask(x, t.threshold, t.scale).flatten(0, -2)
    rows = x.flatten(0, -2)
    y = _product(torch.where(keep, rows, 0.0), t.weight.t())
    if t.lr_a is not None and t.lr_b is not None:
        low = _product(torch.where(keep, 0.0, rows), t.lr_a.t()).to(x.dtype)
        y = y + _product(low, t.lr_b.t())
    if t.bias is not None:
        y = y + t.bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, I] times weight [I, O], in the weight's dtype or fp32.

    torch's own product of bf16 with channel-contiguous weights takes 40 to 100 times as long as a row-major one on
    processors without bf16 products (4096×11008: 0.4 s against 0.005 s): widened blocks are sent to BLAS there.
    """
    if _has_product(x.dtype):
        return torch.mm(x, weight)
    y = torch.zeros(len(x), weight.shape[1], dtype=torch.float32)
    wide = x.float()
    for start in range(0, len(weight), _BLOCK):
        y.addmm_(wide[:, start : start + _BLOCK], weight[start : start + _BLOCK].float())
    return y


def _has_product(dtype: torch.dtype) -> bool:
    mkldnn: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.enabled or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return dtype == torch.float32
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(mkldnn._is_mkldnn_fp16_supported())
    return True


def rows_of(x: Tensor) -> Tensor:
    """Returns the input x [..., I] as rows [T, I] in one piece. Raises SparsifyError for what it cannot take."""
    if x.device.type != "cpu":
        raise SparsifyError(f"the native kernels run on the CPU, the input is on {x.device}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise SparsifyError(f"the input has the shape {list(x.shape)}: it has no channels")
    inputs = x.shape[-1]
    return x.detach().resolve_neg().reshape(x.numel() // inputs, inputs).contiguous()


def checked(dtype: torch.dtype, inputs: int, t: SparseTensors, kept: Tensor | None = None) -> library.CLinear:
    """Returns what the C library is given for one linear, channel-contiguous or row-major.

    The pointers hold as long as the tensors do. Raises SparsifyError for what it cannot take.
    """
    if dtype not in library.DTYPES:
        raise SparsifyError(f"the native kernels take float32, bfloat16 and float16, not {dtype}")
    if t.weight.dim() != 2 or t.weight.shape[1] != inputs:
        raise SparsifyError(f"the input has {inputs} channels, which a weight of {list(t.weight.shape)} does not take")
    outputs, rank = t.weight.shape[0], 0
    _check(t.weight, "weight", dtype, (outputs, inputs))
    by_rows = not (t.weight.stride(0) == 1 and t.weight.stride(1) >= outputs)
    if by_rows and not (t.weight.stride(1) == 1 and t.weight.stride(0) >= inputs):
        raise SparsifyError(f"weight [{outputs}, {inputs}] has strides {t.weight.stride()}: one of them must be 1")
    # A single row or column is both: its other stride says nothing.
    stride = t.weight.stride(0) if by_rows else t.weight.stride(1)
    _check(t.threshold, "threshold", torch.float32, ())
    if t.bias is not None:
        _check(t.bias, "bias", dtype, (outputs,), contiguous=True)
    if t.scale is not None:
        _check(t.scale, "scale", torch.float32, (inputs,), contiguous=True)
    if kept is not None:
        _check(kept, "kept", torch.int64, ())
    if (t.lr_a is None) != (t.lr_b is None):
        raise SparsifyError("lr_a and lr_b belong together: one of them is missing")
    if t.lr_a is not None and t.lr_b is not None:
        rank = t.lr_a.shape[0] if t.lr_a.dim() == 2 else -1
        _check(t.lr_a, "lr_a", dtype, (rank, inputs), contiguous=True)
        _check(t.lr_b, "lr_b", dtype, (outputs, rank))
        if not t.lr_b.t().is_contiguous():
            raise SparsifyError(
                f"lr_b [{outputs}, {rank}] has strides {t.lr_b.stride()}: it must be channel-contiguous"
            )
    return library.CLinear(
        t.weight.data_ptr(),
        stride,
        outputs,
        None if t.bias is None else t.bias.data_ptr(),
        t.threshold.data_ptr(),
        None if t.scale is None else t.scale.data_ptr(),
        None if t.lr_a is None else t.lr_a.data_ptr(),
        None if t.lr_b is None else t.lr_b.data_ptr(),
        rank,
        None if kept is None else kept.data_ptr(),
        int(by_rows),
    )


def _check(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], *, contiguous: bool = False) -> None:
    if tensor.dtype != dtype:
        raise SparsifyError(f"{name} is {tensor.dtype}, the native kernels need {dtype} here")
    if tensor.device.type != "cpu":
        raise SparsifyError(f"{name} is on {tensor.device}, the native kernels run on the CPU")
    if tensor.is_neg():
        raise SparsifyError(f"{name} is a negative view: resolve_neg() of it is what the native kernels can read")
    if tuple(tensor.shape) != shape:
        raise SparsifyError(f"{name} has the shape {list(tensor.shape)}, it must be {list(shape)}")
    if contiguous and not tensor.is_contiguous():
        raise SparsifyError(f"{name} has strides {tensor.stride()}: it must be contiguous")


native_linear = linear_operator("native_linear", lambda x, t: _run(x, (t,))[0])


def _supports(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> bool:
    return _is_ours(device, dtype) and library.load() is not None


def _missing(device: torch.device, dtype: torch.dtype) -> str | None:
    return library.missing() if _is_ours(device, dtype) else None


def _is_ours(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in library.DTYPES


BACKEND = Backend(name="native", priority=10, channel_contiguous=True, supports=_supports, run=run, missing=_missing)
