"""The L1 term of ProSparse (arXiv 2402.13516): the size of what enters each down projection, and its share of zeros.

x₁ = σ(gate x)·up x [B, S, F] is read where it enters down, so any MLP that sparsify.mlp_targets finds will do, fused or
ungated, with LoRA or without. The paper writes Σ_layers ‖x₁‖₁ and leaves the reduction open; here it is named:
`mean`, over tokens and neurons; `sum`, over neurons, and the mean over tokens. Both are summed over layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Reduction = Literal["mean", "sum"]


class L1Regulariser:
    """Reads the inputs of the down projections in forwards of a training model, from attach() on.

    The norm is computed inside each forward, so that gradient checkpointing, which runs forwards again, sees the same
    operations each time; it is kept only inside collecting().
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self._collecting = False
        self._norms: dict[str, Tensor] = {}
        self._zeros: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def attach(self, downs: Mapping[str, nn.Module]) -> None:
        """Hooks the down projections, by the names that they are reported under."""
        for name, module in downs.items():

            def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if module.training:
                    self._see(name, args[0])

            module.register_forward_pre_hook(hook)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, forwards are collected; `norm` is of those of the last time."""
        self._norms, self._collecting = {}, True
        try:
            yield
        finally:
            self._collecting = False

    def norm(self) -> Tensor | None:
        """Returns Σ_layers ‖x₁‖₁, reduced, fp32, with its gradient; None where no down projection was run."""
        norms, self._norms = list(self._norms.values()), {}
        return torch.stack([norm.to(norms[0].device) for norm in norms]).sum() if norms else None

    def take_sparsity(self) -> dict[str, float]:
        """Returns the share of zeros in each down's input since the last call, by name."""
        found = {name: float(self._zeros[name]) / count for name, count in self._counts.items()}
        self._zeros, self._counts = {}, {}
        return found

    def _see(self, name: str, x: Tensor) -> None:
        norm = x.abs().mean(dtype=torch.float32)
        if self._reduction == "sum":
            norm = norm * x.shape[-1]
        if not self._collecting:
            return
        self._norms[name] = norm
        with torch.no_grad():
            zeros = (x == 0).sum()
            self._zeros[name] = self._zeros.get(name, 0) + zeros
            self._counts[name] = self._counts.get(name, 0) + x.numel()
