"""One input site on the GPU: what is launched for its linears, and in which form.

    [select: lists of kept channels, low-rank rest] → gemv

The masked form needs no launch before it; the indexed form and low-rank rows do. Which form: by the density that the
calibration found, because what a token really keeps is known on the device alone. Everything here is decided by shapes,
so a launch is the same every time and can be captured in a CUDA graph.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.kernels.gpu.gemv import sparse_gemv
from sparsify.kernels.gpu.launch import launch
from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.gpu.select import select
from sparsify.kernels.gpu.tiles import MOST_TOKENS, RULES, Table, Tile, tile_for
from sparsify.kernels.spec import SparseTensors
from sparsify.kernels.triton_backend import DTYPES

# Linears that share a launch.
MOST_LINEARS = 3
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
# Triton's interpreter, for tests without a GPU: it has no products in bf16.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Where there is no device to ask: an A100's number, and few programs for the interpreter, which runs them in turn.
_MULTIPROCESSORS, _INTERPRETER_MULTIPROCESSORS = 108, 1
_SEGMENT, _BLOCK_R, _BLOCK_K = 4096, 4, 1024
_SELECT_WARPS = 8
# What a product on tensor cores takes at least.
_LEAST_BLOCK_K = 16


@dataclass(frozen=True)
class Lists:
    """Kept channels [L, K] (int32, in order) and their numbers [L] (int32), by linear of a site."""

    index: Tensor
    count: Tensor


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current: Triton launches on the current one, wherever the tensors are."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def multiprocessors_of(device: torch.device) -> int:
    """Returns the number of multiprocessors (AMD: compute units) of a device."""
    if device.type != "cuda":
        return _INTERPRETER_MULTIPROCESSORS if device.type == "cpu" else _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def run_site(
    x: Tensor,
    site: Sequence[SparseTensors],
    *,
    scratch: Scratch,
    table: Table = RULES,
    up: Tensor | None = None,
    activation: str = "silu",
    lists: Lists | None = None,
    recheck: bool = False,
    indexed: bool | None = None,
    tile: Tile | None = None,
) -> list[Tensor]:
    """Returns the outputs [T, N_l] of a site of at most three linears, checked by `checked`, for x [T, K], T ≤ 8.

    up: the input is act(x) · up. lists: from an earlier launch; recheck: they may hold channels that are not kept;
    indexed: the form, by density where None; tile: how the product is cut, from the table where None.
    """
    tokens, channels = x.shape
    if indexed is None:
        indexed = lists is not None or is_indexed(site, table)
    ranks = [0 if t.lr_a is None else t.lr_a.shape[0] for t in site]
    low = scratch.empty(max(1, tokens * sum(ranks)), torch.float32) if any(ranks) else None
    if (indexed and lists is None) or low is not None:
        made = run_select(
            x, site, scratch=scratch, up=up, activation=activation, low=low, indexed=indexed and lists is None
        )
        lists = lists or made
    outputs = [t.weight.shape[0] for t in site]
    if tile is None:
        multiprocessors = multiprocessors_of(x.device)
        tile = tile_for(
            channels, outputs, x.dtype, tokens, indexed=indexed, multiprocessors=multiprocessors, table=table
        )
    if tokens > 1 and tile.block_k < _LEAST_BLOCK_K:
        raise SparsifyError(f"block_k is {tile.block_k}: for several tokens it must be at least {_LEAST_BLOCK_K}")
    y = scratch.empty(tokens * sum(outputs), x.dtype)
    blocks = sum(triton.cdiv(n, tile.block_n) for n in outputs)
    split = tile.splits > 1
    first = site[0]
    launch(
        sparse_gemv,
        (blocks, tile.splits),
        x,
        up,
        y,
        scratch.empty(tile.splits * tokens * sum(outputs), torch.float32) if split else None,
        scratch.counters(blocks) if split else None,
        lists.index if lists is not None and indexed else None,
        lists.count if lists is not None and indexed else None,
        low,
        *_padded([t.weight for t in site]),
        *_padded([t.bias for t in site]),
        *_padded([t.threshold for t in site]),
        *_padded([t.scale for t in site]),
        # A linear without low rank beside one with it: a pointer that nothing is read from.
        *_padded([t.weight if t.lr_b is None else t.lr_b for t in site] if low is not None else []),
        *_padded([row_stride(t) for t in site]),
        *_padded(outputs),
        *_padded(ranks),
        channels,
        tokens,
        LINEARS=len(site),
        TOKENS=1 if tokens == 1 else 16,
        BIASED=first.bias is not None,
        SCALED=first.scale is not None,
        RANKED=low is not None,
        INDEXED=indexed,
        CHECKED=recheck or not indexed,
        GATED=up is not None,
        ACTIVATION=activation,
        EVEN=all(n % tile.block_n == 0 for n in outputs),
        WIDEN=INTERPRETED,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    sizes = [tokens * n for n in outputs]
    return [part.view(tokens, n) for part, n in zip(y.split(sizes), outputs, strict=True)]


def run_linears(
    x: Tensor,
    site: Sequence[SparseTensors],
    *,
    scratch: Scratch,
    table: Table,
    up: Tensor | None = None,
    activation: str = "silu",
    lists: Lists | None = None,
) -> list[Tensor]:
    """Returns the outputs [T, N_l] of a site of any linears for x [T, K], in as few launches as they allow.

    up, activation and lists are those of run_site; lists are for a site of one launch.
    """
    outputs: list[Tensor] = []
    for members in groups(site):
        part = [site[position] for position in members]
        outputs += run_site(x, part, scratch=scratch, table=table, up=up, activation=activation, lists=lists)
    return outputs


def run_select(
    x: Tensor,
    site: Sequence[SparseTensors],
    *,
    scratch: Scratch,
    up: Tensor | None = None,
    activation: str = "silu",
    low: Tensor | None = None,
    indexed: bool = True,
    relu: bool = False,
    clear: Tensor | None = None,
) -> Lists | None:
    """Launches `select` for a site and x [T, K]: returns its lists where `indexed`, writes t into `low` where given.

    relu: the list is of max(x, 0) above the threshold, of one linear and token; clear [K] is set to 0.
    """
    tokens, channels = x.shape
    ranks = [0 if t.lr_a is None or low is None else t.lr_a.shape[0] for t in site]
    lists = None
    if indexed:
        lists = Lists(scratch.empty(len(site) * channels, torch.int32), scratch.empty(len(site), torch.int32))
    segment = min(_SEGMENT, triton.next_power_of_2(channels))
    programs = len(site) * triton.cdiv(channels, segment) if indexed else 0
    programs += tokens * sum(triton.cdiv(rank, _BLOCK_R) for rank in ranks)
    launch(
        select,
        (programs,),
        x,
        x if up is None else up,
        clear,
        None if lists is None else lists.index,
        None if lists is None else lists.count,
        low,
        *_padded([t.threshold for t in site]),
        *_padded([t.scale for t in site]),
        *_padded([t.weight if t.lr_a is None else t.lr_a for t in site] if low is not None else []),
        *_padded(ranks),
        channels,
        tokens,
        LINEARS=len(site),
        SCALED=site[0].scale is not None,
        RANKED=low is not None,
        INDEXED=indexed,
        GATED=up is not None,
        ACTIVATION=activation,
        RELU=relu,
        CLEAR=clear is not None,
        SEGMENT=segment,
        BLOCK_R=_BLOCK_R,
        BLOCK_K=min(_BLOCK_K, triton.next_power_of_2(channels)),
        num_warps=_SELECT_WARPS,
    )
    return lists


def is_indexed(site: Sequence[SparseTensors], table: Table) -> bool:
    """Returns whether a site is sparse enough for lists of channels: every linear of it, by its density."""
    return all(t.density is not None and t.density < table.indexed_below for t in site)


def groups(site: Sequence[SparseTensors]) -> list[list[int]]:
    """Returns the positions of linears that can share a launch: neighbours, alike in having a bias and a scale."""
    found: list[list[int]] = []
    for position, t in enumerate(site):
        last = site[found[-1][-1]] if found else None
        alike = last is not None and (last.bias is None, last.scale is None) == (t.bias is None, t.scale is None)
        if alike and len(found[-1]) < MOST_LINEARS:
            found[-1].append(position)
        else:
            found.append([position])
    return found


def row_stride(t: SparseTensors) -> int:
    """Returns the elements from one channel of the weight to the next."""
    return int(t.weight.stride(1)) if t.weight.shape[1] > 1 else int(t.weight.shape[0])


def checked(x: Tensor, t: SparseTensors, *, by_rows: bool = False) -> None:
    """Raises SparsifyError for tensors of a linear that the kernels cannot take for x [T, K].

    by_rows: the weight stands row-major instead of channel-contiguous.
    """
    if x.dtype not in DTYPES:
        raise SparsifyError(f"the Triton kernels take {_names(DTYPES)}, not {x.dtype}")
    channels = x.shape[-1]
    if t.weight.dim() != 2 or t.weight.shape[1] != channels:
        raise SparsifyError(
            f"the input has {channels} channels, which a weight of {list(t.weight.shape)} does not take"
        )
    outputs = t.weight.shape[0]
    _check(x, t.weight, "weight", x.dtype, (outputs, channels))
    strides = t.weight.stride()
    if by_rows and not t.weight.is_contiguous():
        raise SparsifyError(f"weight [{outputs}, {channels}] has strides {strides}: it must be row-major here")
    if not by_rows and not ((strides[0] == 1 or outputs == 1) and (strides[1] >= outputs or channels == 1)):
        raise SparsifyError(f"weight [{outputs}, {channels}] has strides {strides}: it must be channel-contiguous")
    _check(x, t.threshold, "threshold", torch.float32, ())
    if t.bias is not None:
        _check(x, t.bias, "bias", x.dtype, (outputs,), contiguous=True)
    if t.scale is not None:
        _check(x, t.scale, "scale", torch.float32, (channels,), contiguous=True)
    if (t.lr_a is None) != (t.lr_b is None):
        raise SparsifyError("lr_a and lr_b belong together: one of them is missing")
    if t.lr_a is not None and t.lr_b is not None:
        rank = t.lr_a.shape[0] if t.lr_a.dim() == 2 else -1
        _check(x, t.lr_a, "lr_a", x.dtype, (rank, channels), contiguous=True)
        _check(x, t.lr_b, "lr_b", x.dtype, (outputs, rank))
        if not t.lr_b.t().is_contiguous():
            raise SparsifyError(
                f"lr_b [{outputs}, {rank}] has strides {t.lr_b.stride()}: it must be channel-contiguous"
            )


def few_rows(x: Tensor) -> Tensor | None:
    """Returns x [..., K] as rows [T, K] in one piece; None where they are more than a launch takes.

    Raises SparsifyError for an input without channels.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise SparsifyError(f"the input has the shape {list(x.shape)}: it has no channels")
    tokens = x.numel() // x.shape[-1]
    if tokens > MOST_TOKENS:
        return None
    return x.detach().resolve_neg().reshape(tokens, x.shape[-1]).contiguous()


def _check(
    x: Tensor, tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], *, contiguous: bool = False
) -> None:
    if tensor.dtype != dtype:
        raise SparsifyError(f"{name} is {tensor.dtype}, the Triton kernels need {dtype} here")
    if tensor.device != x.device:
        raise SparsifyError(f"{name} is on {tensor.device}, the input on {x.device}")
    if tuple(tensor.shape) != shape:
        raise SparsifyError(f"{name} has the shape {list(tensor.shape)}, it must be {list(shape)}")
    if contiguous and not tensor.is_contiguous():
        raise SparsifyError(f"{name} has strides {tensor.stride()}: it must be contiguous")


def _padded(values: Sequence[Any]) -> list[Any]:
    return [*values, *[None] * (MOST_LINEARS - len(values))]


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
