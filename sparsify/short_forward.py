"""One short forward that shows how a model's modules are wired, for a model with weights or without (meta device).

On the meta device no tensor has values: a question about one, such as whether a sequence is packed, is answered with
no, and experts, whose tokens the values choose, are passed over. What is seen is which tensor each module reads, by the
storage that it lies in, and which two tensors a third is the product of.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

_aten = torch.ops.aten
_VALUES = (_aten.item.default, _aten._local_scalar_dense.default, _aten.is_nonzero.default)
_PRODUCTS = (_aten.mul.Tensor, _aten.mul_.Tensor)


@dataclass
class Products:
    """The products of two tensors that a forward computed, as (left, right, product); all are kept alive."""

    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def of(self, left: Tensor, right: Tensor) -> Iterator[Tensor]:
        """Yields the products of these two, in either order."""
        for a, b, product in self.seen:
            if (same_place(a, left) and same_place(b, right)) or (same_place(a, right) and same_place(b, left)):
                yield product


def run_short(model: PreTrainedModel, tokens: Tensor, products: Products | None = None) -> None:
    """Runs the model without its head on tokens [N, S], without a cache; products are recorded where asked for."""
    on_meta = model.device.type == "meta"
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if on_meta:
            stack.enter_context(_experts_passed_over(model))
        if on_meta or products is not None:
            stack.enter_context(_Watching(products))
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)


def same_place(x: Tensor, y: Tensor) -> bool:
    """Whether two living tensors begin at the same place of one storage: the same values, as far as both reach.

    Not by address, which is 0 on the meta device.
    """
    return (
        x.untyped_storage()._cdata == y.untyped_storage()._cdata
        and x.storage_offset() == y.storage_offset()
        and x.device == y.device
    )


def is_expert_weight(module: nn.Module, parameter: Tensor) -> bool:
    """Whether the parameter holds the matrices of all experts [E, O, I]; a convolution's weight is 3-D as well."""
    return parameter.dim() == 3 and not isinstance(module, nn.Conv1d)


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, products: Products | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products = products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _VALUES and args[0].is_meta:
            return False if args[0].dtype is torch.bool else 0
        found = func(*args, **(kwargs or {}))
        if self._products is not None and func in _PRODUCTS and isinstance(args[1], Tensor):
            self._products.seen.append((args[0], args[1], found))
        return found


@contextmanager
def _experts_passed_over(model: PreTrainedModel) -> Iterator[None]:
    experts = [
        module
        for module in model.modules()
        if any(is_expert_weight(module, parameter) for parameter in module.parameters(recurse=False))
    ]
    for module in experts:
        module.forward = lambda x, *args, **kwargs: torch.empty_like(x)
    try:
        yield
    finally:
        for module in experts:
            del module.forward
