"""The runtime layers: linears that use only the input channels that matter for each token.

They never learn which method made their tensors. Every value that inference uses is a buffer; the dense weight
keeps its name and shape, so a checkpoint is still the dense model where this package is not installed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from sparsify.kernels.dispatch import select_backend
from sparsify.kernels.layout import channel_contiguous
from sparsify.kernels.reference import keep_mask
from sparsify.kernels.spec import Backend, SparseTensors
from sparsify.rectified import is_rectified, rectify

if TYPE_CHECKING:
    from sparsify.layer_part import LayerPart


class SparsitySwitch:
    """Whether the layers of one model run sparse now. One object, shared by all of them; `runtime` sets it."""

    def __init__(self) -> None:
        self.forced_dense = False
        self.in_prefill = False
        self.prefill = "sparse"
        self.prefill_hook: RemovableHandle | None = None

    @property
    def sparse(self) -> bool:
        return not (self.forced_dense or self.in_prefill)


class SparseLayer(nn.Module):
    """The part that SparseLinear and SparseConv1D share: buffers, switch, backend."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    threshold: Tensor
    scale: Tensor | None
    lr_a: Tensor | None
    lr_b: Tensor | None
    sparse_bias: Tensor | None
    switch: SparsitySwitch
    backend: Backend
    backend_name: str | None
    # The share of channels that calibration text kept: a hint for choosing a kernel.
    density: float | None = None
    # Whether other modules read this one's buffers, so that they must stay in memory.
    lends_buffers = False
    # What this process holds of a layer that several hold together; None: the whole of it.
    part: "LayerPart | None" = None

    def _add_buffers(
        self, inputs: int, outputs: int, *, scaled: bool, rank: int, compensated: bool, switch: SparsitySwitch
    ) -> None:
        like = self.weight
        self.sparse_in, self.sparse_out, self.rank = inputs, outputs, rank
        # -1 keeps every channel: a layer without fitted tensors is the dense one.
        self.register_buffer("threshold", torch.full((), -1.0, dtype=torch.float32, device=like.device))
        scale = torch.ones(inputs, dtype=torch.float32, device=like.device) if scaled else None
        self.register_buffer("scale", scale)
        for name, shape in (("lr_a", (rank, inputs)), ("lr_b", (outputs, rank))):
            factor = torch.zeros(shape, dtype=like.dtype, device=like.device) if rank else None
            self.register_buffer(name, factor)
        # The bias of sparse forwards, the mean of what they drop in it; the dense model keeps its own.
        mended = torch.zeros(outputs, dtype=like.dtype, device=like.device) if compensated else None
        self.register_buffer("sparse_bias", mended)
        self.switch = switch
        self.bind()

    def bind(self, name: str | None = None) -> None:
        """Chooses the backend for the device, dtype and shape of now, and lays the weight out as it wants it.

        A name holds through later casts and moves, until the next bind.
        """
        weight = self.tensors().weight
        outputs, inputs = weight.shape
        self.backend = select_backend(weight.device, weight.dtype, inputs, outputs, name=name)
        self.backend_name = name
        if weight.device.type == "meta":
            return
        if self.backend.channel_contiguous:
            if not weight.t().is_contiguous():
                self.weight.data = channel_contiguous(self.weight.data)
            if self.lr_b is not None:
                self.lr_b = channel_contiguous(self.lr_b)
        else:
            if not self.weight.is_contiguous():
                self.weight.data = self.weight.data.contiguous()
            if self.lr_b is not None:
                self.lr_b = self.lr_b.contiguous()

    @property
    def runs_sparse(self) -> bool:
        """Whether a forward would run sparse now."""
        return self.switch.sparse

    def tensors(self) -> SparseTensors:
        bias = self._bias(sparse=True)
        return SparseTensors(self.weight, bias, self.threshold, self.scale, self.lr_a, self.lr_b, self.density)

    def every_channel(self) -> SparseTensors:
        """Returns the layer's tensors with every channel kept: low rank and compensation have nothing left to do."""
        return SparseTensors(self.tensors().weight, self._bias(sparse=False), self.threshold.new_full((), -1.0))

    def keep(self, x: Tensor) -> Tensor:
        """Returns the channels of x [..., I] that a sparse forward uses, bool, the same shape."""
        return keep_mask(x, self.threshold, self.scale)

    def threshold_problem(self, value: float) -> str | None:
        """Returns what is wrong with a finite threshold read from a file, in one line; None where nothing is."""
        if value < 0.0 and value != -1.0:
            return f"holds {value:g}, it must be at least 0, or -1 to keep every channel"
        return None

    def splits(self, by: str) -> bool:
        """Whether processes that hold a part of the "outputs" or "inputs" each can choose as one process would."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output for x [..., I]."""
        if self.part is None:
            return self._forward(x)
        return self.part.run(x, self._forward, self._late_bias())

    def _forward(self, x: Tensor) -> Tensor:
        y = self._run(x)
        return self._dense(x) if y is None else y

    def _dense(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self._bias(sparse=False))

    def _bias(self, *, sparse: bool) -> Tensor | None:
        """Returns the bias that this layer's own products add: none where it is added after a sum over processes."""
        if self.part is not None and self.part.by == "inputs":
            return None
        return self.sparse_bias if sparse and self.sparse_bias is not None else self.bias

    def _late_bias(self) -> Tensor | None:
        return self.sparse_bias if self.switch.sparse and self.sparse_bias is not None else self.bias

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.part is not None:
            for key in destination.keys() & {prefix + name for name in (*self._parameters, *self._buffers)}:
                destination[key] = self.part.joined(key.removeprefix(prefix), destination[key])

    def _run(self, x: Tensor) -> Tensor | None:
        """Returns the output by the backend; None where torch's own dense linear is right and fast."""
        if self.switch.sparse:
            return self.backend.run(x, (self.tensors(),))[0]
        if not self.backend.channel_contiguous:
            return None
        # torch's product with such a weight can be a hundred times slower than the backend's, where nothing is dropped.
        return self.backend.run(x, (self.every_channel(),))[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(bfloat16) must not round thresholds and scales: keep their fp32 values, follow the device only.
        before = {name: self._buffers[name] for name in ("threshold", "scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != torch.float32:
                self._buffers[name] = torch.empty_like(new, dtype=torch.float32) if old.is_meta else old.to(new.device)
        self.bind(self.backend_name)
        return self


class SparseLinear(SparseLayer, nn.Linear):  # type: ignore[misc]
    """nn.Linear [O, I] with a channel threshold, and optionally score scales, a low-rank rest, a compensated bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        scaled: bool,
        rank: int,
        compensated: bool = False,
        switch: SparsitySwitch,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._add_buffers(in_features, out_features, scaled=scaled, rank=rank, compensated=compensated, switch=switch)


class SparseConv1D(SparseLayer, Conv1D):  # type: ignore[misc]
    """GPT-2's Conv1D, a linear whose weight is stored [I, O], made sparse; already channel-contiguous."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scaled: bool,
        rank: int,
        compensated: bool = False,
        switch: SparsitySwitch,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        with torch.device(device or torch.get_default_device()):
            Conv1D.__init__(self, out_features, in_features)  # type: ignore[no-untyped-call]
        if dtype is not None:
            nn.Module._apply(self, lambda t: t.to(dtype))  # type: ignore[no-untyped-call]
        self._add_buffers(in_features, out_features, scaled=scaled, rank=rank, compensated=compensated, switch=switch)

    def tensors(self) -> SparseTensors:
        return replace(super().tensors(), weight=self.weight.t())

    def _dense(self, x: Tensor) -> Tensor:
        return Conv1D.forward(self, x)  # type: ignore[no-any-return, no-untyped-call]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one that can be made sparse: nn.Linear itself or Conv1D, no subclass of other formats."""
    return type(module) in (nn.Linear, Conv1D, nn.modules.linear.NonDynamicallyQuantizableLinear)


def make_sparse(
    linear: nn.Module,
    *,
    scaled: bool,
    rank: int,
    compensated: bool = False,
    switch: SparsitySwitch,
    kinds: tuple[type[SparseLinear], type[SparseConv1D]] = (SparseLinear, SparseConv1D),
) -> SparseLinear | SparseConv1D:
    """Returns a sparse layer that takes over linear's parameters (no copy), with buffers that keep every channel.

    kinds: what nn.Linear and Conv1D become. Raises TypeError for another module than these.
    """
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    layer: SparseLinear | SparseConv1D
    if isinstance(linear, nn.Linear):
        layer = kinds[0](
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            scaled=scaled,
            rank=rank,
            compensated=compensated,
            switch=switch,
            device="meta",
            dtype=weight.dtype,
        )
    elif isinstance(linear, Conv1D):
        layer = kinds[1](
            linear.nx,
            linear.nf,
            scaled=scaled,
            rank=rank,
            compensated=compensated,
            switch=switch,
            device="meta",
            dtype=weight.dtype,
        )
    else:
        raise TypeError(f"{type(linear).__name__} is not a linear that can be made sparse")
    layer.weight, layer.bias = weight, linear.bias
    if is_rectified(linear):
        rectify(layer)
    if not weight.is_meta:
        _materialise_buffers(layer, weight.device)
    layer.train(linear.training)
    layer.bind()
    return layer


def _materialise_buffers(layer: SparseLinear | SparseConv1D, device: torch.device) -> None:
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            layer._buffers[name] = torch.zeros_like(buffer, device=device)
    layer.threshold.fill_(-1.0)
    if layer.scale is not None:
        layer.scale.fill_(1.0)
    if layer.sparse_bias is not None and layer.bias is not None:
        layer.sparse_bias.copy_(layer.bias.detach())
