"""What is cut where whole neurons of an MLP are chosen: gate and up by rows, down by columns (sparsify.mlp_layer).

gate-threshold keeps neuron i of a token where |act(gate_i)| > t (CATS, arXiv 2404.08763): rows of up and columns of
down. relu keeps it where the ReLU of its gate, or of up where there is none, is above t. prompt-top-k keeps k neurons
of a sequence, which its prompt chooses (GRIFFIN, arXiv 2404.01365): in all of them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

NeuronCut = Literal["gate-threshold", "prompt-top-k", "relu"]


@dataclass(frozen=True)
class Mlp:
    """Module names of one MLP: down(act(gate x) · up x), or down(act(up x)) where gate is None.

    gate and up are the same name where one linear [2F, I] holds both, the gate's rows first. neurons is F.
    """

    up: str
    down: str
    activation: str
    neurons: int
    gate: str | None = None

    @property
    def fused(self) -> bool:
        return self.gate == self.up

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of its linears, each once."""
        return tuple(dict.fromkeys(name for name in (self.gate, self.up, self.down) if name is not None))

    def shares(self, cut: NeuronCut) -> dict[str, float]:
        """Returns the share of each linear's weight that is touched for chosen neurons only, by name."""
        if cut == "prompt-top-k":
            return dict.fromkeys(self.linears, 1.0)
        if cut == "relu" and (self.gate is None or self.fused):
            return {self.down: 1.0}
        return {self.up: 0.5 if self.fused else 1.0, self.down: 1.0}


@dataclass(frozen=True)
class NeuronCuts:
    """The one cut of a model, and the MLPs that it cuts."""

    cut: NeuronCut
    mlps: tuple[Mlp, ...]


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation function of transformers, torch or ours, with no modules inside."""
    known = type(module).__module__ in (
        "transformers.activations",
        "torch.nn.modules.activation",
        "sparsify.activations",
    )
    return (known or isinstance(module, nn.ReLU)) and not any(True for _ in module.children())


def zero_at_zero(activation: nn.Module) -> bool:
    """Whether act(0) is 0, so that a neuron whose gate is set to 0 has no part in the output."""
    with torch.inference_mode():
        return not bool(activation(torch.zeros(1, device="cpu")).any())
