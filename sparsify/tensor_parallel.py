"""Converted models over several processes: transformers' tensor parallelism, carried on to what sparsify adds.

`from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))` reads of each dense weight the part of
its process. The linears of a block come in two kinds, by the plan of the model (Megatron's, arXiv 1909.08053 §3): q, k,
v, gate and up are divided by outputs, o and down by inputs. `split_layers` cuts the added tensors of each in the same
way after the load. A fixed threshold chooses in a part of the channels as it does in all of them; a k, a mean or a
rotation does not, so layers with one are refused where their inputs are divided, before a weight is read.
Not covered: other kinds of parallelism (FSDP, pipelines, experts), and plans that pack several matrices in one.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from sparsify.errors import SparsifyError
from sparsify.layer_part import LayerPart
from sparsify.linear import SparseConv1D, SparseLinear
from sparsify.preflight import ADDED
from sparsify.runtime import is_divided, sparse_layers

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


def read_in_parts(model: "PreTrainedModel", method: str) -> RemovableHandle:
    """Has from_pretrained read of the added tensors, too, this process's part only, until the handle is removed.

    It reads a part of what is a DTensor in the state_dict that it takes once the dense weights are divided.
    Raises SparsifyError for a method whose layers choose among all channels, and for other kinds of parallelism.
    """
    _check_divisible(model, method)

    def place(*_: Any) -> None:
        for layer, part in _divided(model, method):
            if layer.weight.is_meta:
                for name, buffer in layer._buffers.items():
                    if buffer is not None and not isinstance(buffer, DTensor):
                        layer._buffers[name] = part.placeholder(name, buffer)

    handle: RemovableHandle = model.register_state_dict_pre_hook(place)  # type: ignore[no-untyped-call]
    return handle


def split_layers(model: "PreTrainedModel", method: str) -> None:
    """Makes every sparse layer whose weight was read in part run, and be saved, as this process's part of it.

    Raises SparsifyError as read_in_parts does.
    """
    for layer, part in list(_divided(model, method)):
        _split(layer, part)


def _divided(model: "PreTrainedModel", method: str) -> Iterator[tuple[SparseLinear | SparseConv1D, LayerPart]]:
    if not is_divided(model):
        return
    plan = _plan_of(model)
    for name, layer in sparse_layers(model).items():
        weight: Any = layer.weight
        if isinstance(weight, DTensor):
            by, whole = _check_layer(name, layer, _style_of(name, plan), method)
            size = layer.sparse_out if by == "outputs" else layer.sparse_in
            yield layer, LayerPart(by, whole, size, weight.device_mesh)


def _split(layer: SparseLinear | SparseConv1D, part: LayerPart) -> None:
    # transformers makes a parameter of every tensor that it reads in part.
    for name in [name for name in layer._parameters if name in ADDED]:
        layer._buffers[name] = layer._parameters.pop(name)
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            own = part.of(name, parameter.detach())
            layer._parameters[name] = nn.Parameter(own, requires_grad=parameter.requires_grad)
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            layer._buffers[name] = part.of(name, buffer.detach())
    # transformers' own, which knows neither the low rank nor the compensated bias.
    layer.__dict__.pop("forward", None)
    layer.part = part


def _check_divisible(model: "PreTrainedModel", method: str) -> None:
    asked = getattr(model.config, "distributed_config", None)
    # A mapping is what some config.json holds.
    if asked is None or isinstance(asked, dict):
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


def _check_layer(
    name: str, layer: SparseLinear | SparseConv1D, style: str | None, method: str
) -> tuple[Literal["outputs", "inputs"], bool]:
    if style is None or style not in _STYLES or isinstance(layer, SparseConv1D):
        kind = "Conv1D" if isinstance(layer, SparseConv1D) else "linear"
        raise SparsifyError(
            f"the tensor-parallel plan divides the converted {kind} {name!r} as {style!r}: linears can be divided as "
            f"{', '.join(_STYLES)}"
        )
    by, whole = _STYLES[style]
    if not layer.splits(by):
        raise SparsifyError(
            f"method {method} cannot run under tensor parallelism: {name} would have a part of its {by} in each "
            f"process, and chooses among all of them. {', '.join(_methods_that_can())} can; or spread the whole "
            "layers over devices with device_map='auto'"
        )
    return by, whole


def _methods_that_can() -> list[str]:
    from sparsify.methods import available

    return [name for name, info in available().items() if info.facts.tensor_parallel]


def _plan_of(model: "PreTrainedModel") -> dict[str, str]:
    plan: Any = model.tp_plan
    return dict(plan or {})


def _style_of(name: str, plan: Mapping[str, str]) -> str | None:
    from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

    return plan.get(replace_layer_number_by_wildcard(name))
