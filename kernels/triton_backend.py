"""The Triton GPU backend: thresholded sparse GEMV over channel-contiguous weights, bf16, fp16 and fp32, NVIDIA and AMD.

1 to 8 tokens: one launch a site (`gpu.site`), reading only the channels that some token keeps. More tokens: the mask on
the input and dense products, where nearly every channel is read anyway. Sums are in fp32 and rounded once; two runs
give the same bits. Nothing waits for the device: a call can be captured in a CUDA graph, after one call before.
Not covered: fp64, devices that Triton has no compiler for.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sparsify.kernels.reference import sparse_linear
from sparsify.kernels.spec import Backend, SparseTensors
from sparsify.kernels.torch_operator import by_operator, linear_operator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(x: Tensor, site: Sequence[SparseTensors]) -> list[Tensor]:
    """Returns the outputs [..., O_k] of the linears of one site for x [..., I].

    Raises SparsifyError for tensors that the kernels cannot take: another dtype, device, shape or layout.
    """
    outputs = by_operator(triton_linear, x, site)
    return _run(x, site) if outputs is None else outputs


def _run(x: Tensor, site: Sequence[SparseTensors]) -> list[Tensor]:
    # Triton is imported where it is used: it is not there on every machine.
    from sparsify.kernels.gpu.scratch import scratch_of
    from sparsify.kernels.gpu.site import checked, few_rows, on_device, run_linears
    from sparsify.kernels.gpu.tiles import table_of

    rows = few_rows(x)
    for tensors in site:
        checked(x, tensors)
    if rows is None:
        return [sparse_linear(x, tensors) for tensors in site]
    if not len(rows):
        return [x.new_empty((*x.shape[:-1], t.weight.shape[0])) for t in site]
    with on_device(x.device):
        outputs = run_linears(rows, site, scratch=scratch_of(x.device), table=table_of(x.device))
    return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]


triton_linear = linear_operator("triton_linear", lambda x, t: _run(x, (t,))[0])


@cache
def is_installed() -> bool:
    """Returns whether Triton is there: without it the modules of `gpu` cannot be imported."""
    return importlib.util.find_spec("triton") is not None


def _supports(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> bool:
    return _is_ours(device, dtype) and is_installed()


def _missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _is_ours(device, dtype) or is_installed():
        return None
    return (
        "Triton is not installed, so the GPU kernels cannot run and the dense product of torch does: pip install triton"
    )


def _is_ours(device: torch.device, dtype: torch.dtype) -> bool:
    # ROCm's devices are called cuda too.
    return device.type == "cuda" and dtype in DTYPES


BACKEND = Backend(name="triton", priority=20, channel_contiguous=True, supports=_supports, run=run, missing=_missing)
