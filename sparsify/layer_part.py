"""One process's part of a sparse layer that several processes hold together (tensor parallelism).

Either rows of the weight [O, I], for a part of the outputs, or columns, for a part of the inputs: then the outputs of
the parts are summed, and biases are added once, after the sum. Which tensors are cut along and which are whole follows
from that: threshold and `scale` choose input channels, A [R, I] reads them, B [O, R] writes outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

# The dimension along which a tensor of a layer is cut; one that is not named is whole in every process.
_CUT: Mapping[str, Mapping[str, int]] = {
    "outputs": {"weight": 0, "bias": 0, "lr_b": 0, "sparse_bias": 0},
    "inputs": {"weight": 1, "scale": 0, "lr_a": 1},
}


@dataclass(frozen=True)
class LayerPart:
    """Which part of a layer [O, I] this process holds.

    by: what is divided. whole: the layer's side of the other processes: with "outputs" it returns all O outputs in
    each, with "inputs" it is given all I inputs in each; otherwise only this process's. size: O or I, of all parts.
    """

    by: Literal["outputs", "inputs"]
    whole: bool
    size: int
    mesh: DeviceMesh

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerPart":
        # A process group is one of the process, not of a model.
        return self

    @property
    def range(self) -> slice:
        """The rows or columns of W that are this process's."""
        count, start = Shard.local_shard_size_and_offset(self.size, self.mesh.size(), self.mesh.get_local_rank())
        return slice(start, start + count)

    def placeholder(self, name: str, tensor: Tensor) -> Tensor:
        """Returns what stands for a tensor that is not read yet, on the meta device: a DTensor where it is cut."""
        dim = _CUT[self.by].get(name)
        return tensor if dim is None else distribute_tensor(tensor, self.mesh, [Shard(dim)], src_data_rank=None)

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Returns this process's part of a tensor of the layer that was read in part or as a whole, not as DTensor."""
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        dim = _CUT[self.by].get(name)
        if dim is None:
            return tensor
        part = self.range
        # A copy, so that the whole can go.
        return tensor.narrow(dim, part.start, part.stop - part.start).clone()

    def joined(self, name: str, tensor: Tensor) -> Tensor:
        """Returns the tensor as all processes hold it: a DTensor of the whole shape where it is cut."""
        dim = _CUT[self.by].get(name)
        return tensor if dim is None else self._sharded(tensor, dim)

    def run(self, x: Tensor, own: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor:
        """Returns the layer's output for x [..., I] or this process's channels of it; own: what this part computes."""
        if x.requires_grad and (self.by == "outputs" or self.whole):
            x = _SumOfGradients.apply(x, self.mesh)  # type: ignore[no-untyped-call]
        if self.by == "outputs":
            y = own(x)
            return self._sharded(y, y.dim() - 1).redistribute(placements=[Replicate()]).to_local() if self.whole else y
        y = own(x[..., self.range] if self.whole else x)
        if y.requires_grad:
            y = _Sum.apply(y, self.mesh)  # type: ignore[no-untyped-call]
        else:
            dist.all_reduce(y := y.contiguous(), group=self.mesh.get_group())
        return y if bias is None else y + bias

    def _sharded(self, tensor: Tensor, dim: int) -> DTensor:
        shape = list(tensor.shape)
        shape[dim] = self.size
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            tensor, self.mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
        )


class _Sum(torch.autograd.Function):
    """The sum over the processes; what comes after it is the same in each, so its gradient is each one's own."""

    @staticmethod
    def forward(context: Any, y: Tensor, mesh: DeviceMesh) -> Tensor:
        total = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=mesh.get_group())
        return total

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _SumOfGradients(torch.autograd.Function):
    """Nothing forwards; backwards the sum over the processes: each has used x in its own way, or a part of it."""

    @staticmethod
    def forward(context: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        context.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=context.mesh.get_group())
        return gradient, None
