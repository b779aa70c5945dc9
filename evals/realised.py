"""The share of channels (rows, where neurons are cut) that each sparse layer really keeps on some text, run sparse.

A threshold that was fitted on calibration text keeps more or fewer channels elsewhere. Put the densities into the
ledger (`Ledger.with_densities`) for the realised sparsity. Not covered: padding counts as tokens, so measure without.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsify.linear import SparseConv1D, SparseLinear
from sparsify.runtime import sparse_layers


class RealisedDensity:
    """A context manager: inside, every sparse forward of the model's layers is counted."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = sparse_layers(model)
        self._handles: list[RemovableHandle] = []
        self._kept: dict[str, Tensor] = {}
        self._all: dict[str, int] = dict.fromkeys(self._layers, 0)
        self._tokens = dict.fromkeys(self._layers, 0)

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._counter(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def densities(self) -> dict[str, float]:
        """Returns kept / all channels by layer name, over its sparse tokens; layers that saw none are left out."""
        return {name: float(kept) / self._all[name] for name, kept in self._kept.items()}

    @property
    def tokens(self) -> int:
        """Tokens that ran sparse: the most of any layer (an expert sees only a part of them)."""
        return max(self._tokens.values(), default=0)

    def _counter(self, name: str) -> Any:
        def count(layer: SparseLinear | SparseConv1D, args: tuple[Tensor, ...]) -> None:
            if not layer.runs_sparse or args[0].numel() == 0:
                return
            x = args[0]
            # Stays on the device: a read would stop the stream at every layer.
            keep = layer.keep(x)
            kept = keep.sum(dtype=torch.int64)
            self._kept[name] = self._kept[name] + kept if name in self._kept else kept
            self._all[name] += keep.numel()
            self._tokens[name] += x.numel() // x.shape[-1]

        return count
