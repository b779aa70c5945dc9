"""The choice of channels block by block: what sparsify.channel_conversion does, for the linears of one block."""

import torch

from sparsify.allocation import Allocation, Choices, Problem
from sparsify.calibration import Calibration, run_batches
from sparsify.channel_conversion import Channels, fit_channels, prepare, swap_channels
from sparsify.config import LinearEntry, SparsifyConfig
from sparsify.conversion import channel_config
from sparsify.linear import SparsitySwitch
from sparsify.methods import Method
from sparsify.runtime import sparse_layers
from sparsify.streaming.memory import give_back
from sparsify.streaming.model import BlockwiseModel
from sparsify.targets import linear_shapes


class BlockConverter:
    """Converts the block of a blockwise model that is in memory."""

    def __init__(
        self, blockwise: BlockwiseModel, method: Method, allocation: Allocation, calibration: Calibration
    ) -> None:
        self.blockwise, self.method, self.allocation, self.calibration = blockwise, method, allocation, calibration
        self._switch = SparsitySwitch()

    def plan(self) -> None:
        """Finds the targets, and settles what depends on shapes alone. Raises as convert does for a budget."""
        self.targets = self.blockwise.find_targets(self.calibration.tokens[:1, :8])
        self.shapes = linear_shapes(self.blockwise.model, self.targets)
        self.bound = self.method.bind(self.shapes)
        self._choices: Choices = {}
        if self.allocation.needs == "shapes":
            problem = Problem(self.blockwise.model, self.bound, self.shapes, {}, self.calibration)
            self._choices = self.allocation.choices(problem)

    def convert(self, index: int) -> dict[str, LinearEntry]:
        """Puts sparse layers into block `index`, which is in memory, and returns their entries.

        Dense hidden states are carried through it meanwhile, all windows of the calibration text.
        """
        model, prefix = self.blockwise.model, f"{self.blockwise.prefix}.{index}."
        shapes = {name: shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        if not shapes:
            run_batches(model, self.calibration.tokens, "carry", None)
            return {}
        linears = prepare(model, self.targets, shapes, getattr(self.bound, "svd", "auto"))
        give_back()
        choices = {name: self._choices[name] for name in shapes if name in self._choices} or self.allocation.choices(
            Problem(model, self.bound, shapes, linears, self.calibration)
        )
        fits = fit_channels(model, self.bound, linears, choices, shapes, self.calibration, None)
        give_back()
        channels = Channels(linears, fits, self.allocation.name, rotated=False)
        entries = channels.entries()
        with torch.no_grad():
            swap_channels(model, channels, self._switch)
        give_back()
        for name, layer in sparse_layers(model).items():
            layer.density = entries[name].density
        return entries

    def config(self, entries: dict[str, LinearEntry]) -> SparsifyConfig:
        """Returns the configuration of the whole model from the entries of all blocks."""
        linears = {name: entries[name] for name in self.shapes}
        return channel_config(
            self.bound, self.calibration, self.targets, linears, allocation=self.allocation.name, rotated=False
        )
