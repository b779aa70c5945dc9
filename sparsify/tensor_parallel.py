"""Converted models over several processes: transformers' tensor parallelism, carried on to what sparsify adds.

`from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))` reads of each dense weight the part of
its process. The linears of a block come in two kinds, by the plan of the model (Megatron's, arXiv 1909.08053 §3): q, k,
v, gate and up are divided by outputs, o and down by inputs. `split_layers` cuts the added tensors of each in the same
way after the load. A fixed threshold chooses in a part of the channels as it does in all of them; a k, a mean or a
rotation does not, so layers with one are refused where their inputs are divided, before a weight is read.
Not covered: other kinds of parallelism (FSDP, pipelines, experts), and plans that pack several matrices in one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.layer_part import LayerPart
from sparsify.linear import SparseConv1D, SparseLinear
from sparsify.runtime import sparse_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How each style of a plan divides a linear, and whether the other side of it is whole in every process.
_STYLES: Mapping[str, tuple[Literal["outputs", "inputs"], bool]] = {
    "colwise": ("outputs", False),
    "colwise_gather_output": ("outputs", True),
    "colwise_rep": ("outputs", True),
    "rowwise": ("inputs", False),
    "rowwise_split_input": ("inputs", True),
    "rowwise_rep": ("inputs", True),
}
_OTHER_SIZES = ("dp_size", "fsdp_size", "pp_size", "ep_size")


def is_divided(model: nn.Module) -> bool:
    """Whether this process holds a part of the model only."""
    return getattr(model, "_device_mesh", None) is not None


def check_divisible(model: "PreTrainedModel", method: str) -> None:
    """Checks, before weights are read, that the model can run in the way that from_pretrained was asked to divide it.

    Raises SparsifyError for a method whose layers choose among all channels, and for other kinds of parallelism.
    """
    asked = getattr(model.config, "distributed_config", None)
    if asked is None:
        return
    for name in _OTHER_SIZES:
        if (size := getattr(asked, name, None)) not in (None, 1):
            raise SparsifyError(
                f"{name} is {size}: converted models are divided by tensor parallelism only, "
                "DistributedConfig(tp_plan='auto')"
            )
    if asked.tp_size in (None, 1):
        return
    plan = _plan_of(model) | (asked.tp_plan if isinstance(asked.tp_plan, dict) else {})
    for name, layer in sparse_layers(model).items():
        if (style := _style_of(name, plan)) is not None:
            _check_layer(name, layer, style, method)


def split_layers(model: "PreTrainedModel", method: str) -> None:
    """Makes every sparse layer whose weight was read in part run, and be saved, as this process's part of it.

    Raises SparsifyError as check_divisible does.
    """
    if not is_divided(model):
        return
    from torch.distributed.tensor import DTensor

    plan = _plan_of(model)
    for name, layer in sparse_layers(model).items():
        weight: Any = layer.weight
        if not isinstance(weight, DTensor):
            continue
        style = _style_of(name, plan)
        _check_layer(name, layer, style, method)
        by, whole = _STYLES[cast(str, style)]
        size = layer.sparse_out if by == "outputs" else layer.sparse_in
        _split(layer, LayerPart(by, whole, size, weight.device_mesh))


def _split(layer: SparseLinear | SparseConv1D, part: LayerPart) -> None:
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            layer._parameters[name] = nn.Parameter(_local(parameter), requires_grad=parameter.requires_grad)
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            layer._buffers[name] = part.of(name, buffer)
    # transformers' own, which knows neither the low rank nor the compensated bias.
    layer.__dict__.pop("forward", None)
    layer.part = part


def _local(tensor: Tensor) -> Tensor:
    found: Any = tensor.detach()
    return cast(Tensor, found.to_local() if hasattr(found, "to_local") else found)


def _check_layer(name: str, layer: SparseLinear | SparseConv1D, style: str | None, method: str) -> None:
    if style not in _STYLES or isinstance(layer, SparseConv1D):
        kind = "Conv1D" if isinstance(layer, SparseConv1D) else "linear"
        raise SparsifyError(
            f"the tensor-parallel plan divides the converted {kind} {name!r} as {style!r}: linears can be divided as "
            f"{', '.join(_STYLES)}"
        )
    by, _ = _STYLES[style]
    if not layer.splits(by):
        raise SparsifyError(
            f"method {method} cannot run under tensor parallelism: {name} would have a part of its {by} in each "
            f"process, and chooses among all of them. {', '.join(_methods_that_can())} can; or spread the whole "
            "layers over devices with device_map='auto'"
        )


def _methods_that_can() -> list[str]:
    from sparsify.methods import available

    return [name for name, info in available().items() if info.facts.tensor_parallel]


def _plan_of(model: "PreTrainedModel") -> dict[str, str]:
    plan: Any = model.tp_plan
    return dict(plan or {})


def _style_of(name: str, plan: Mapping[str, str]) -> str | None:
    from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

    return plan.get(replace_layer_number_by_wildcard(name))
