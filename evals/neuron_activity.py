"""What the neurons of ReLU MLPs do on a text: zeros, dead ones, and which are on together.

A neuron is on for a token where the activation of its MLP is not 0 (with dReLU: where down's input is not 0).
zeros is the share that is off, over tokens and neurons: the dynamic dead-neuron rate (AP). Statically dead neurons are
off for every token of this text. Co-activation, of pairs of different neurons i, j that are both on at some time: lift
is Σ P(i, j) / Σ P(i)·P(j), 1 where neurons are on independently of each other; partner is the mean over i of the
largest P(j | i). repeated is the mean share of a token's neurons that were on for the token before it, too. Pairs are
counted among 1,024 neurons at most, evenly spread. Not covered: MLPs of experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration import Progress, hooked, run_batches
from sparsify.errors import SparsifyError
from sparsify.mlp_targets import find_mlps
from sparsify.neuron_cut import Mlp
from sparsify.runtime import sparse_layers, with_prefill
from sparsify.targets import find_targets
from sparsify.text import Windows

_MOST_PAIRED = 1024


@dataclass(frozen=True)
class Activity:
    """One MLP, by the name of its down. repeated and co-activation are None where no neuron was on."""

    mlp: str
    neurons: int
    zeros: float
    dead: int
    lift: float | None
    partner: float | None
    repeated: float | None


def neuron_activity(model: PreTrainedModel, text: Windows, progress: Progress | None = None) -> tuple[Activity, ...]:
    """Runs the model, dense or converted, once over the windows, every token sparse; returns its MLPs in call order.

    Raises SparsifyError for a model without MLPs that can be found.
    """
    mlps = _mlps_of(model, text)
    counts = {mlp.down: _Counts(mlp.neurons, model.device) for mlp in mlps}
    downs = {mlp.down: model.get_submodule(mlp.down) for mlp in mlps}

    def see(name: str, h: Tensor) -> None:
        counts[name].add(h.flatten(0, -2) != 0)

    with with_prefill(model, "sparse") if sparse_layers(model) else torch.inference_mode(), hooked(downs, see):
        run_batches(model, text.tokens, "neurons", progress)
    return tuple(counts[mlp.down].activity(mlp.down) for mlp in mlps)


def _mlps_of(model: PreTrainedModel, text: Windows) -> Sequence[Mlp]:
    if sparse_layers(model):
        neurons = model.config.quantization_config.neurons
        found: Sequence[Mlp] = () if neurons is None else neurons.mlps
        needed = "its checkpoint does not cut neurons: look at the dense model it was made from"
    else:
        tokens = text.tokens[:1, :8]
        found = find_mlps(model, find_targets(model, tokens), tokens)
        needed = "no MLP of linears can be found in its blocks"
    if not found:
        raise SparsifyError(f"{type(model).__name__} has no neurons to watch: {needed}")
    return found


class _Counts:
    """What one MLP's neurons [F] were, over all tokens."""

    def __init__(self, neurons: int, device: torch.device) -> None:
        self.on = torch.zeros(neurons, dtype=torch.int64, device=device)
        step = -(-neurons // _MOST_PAIRED)
        self.chosen = torch.arange(0, neurons, step, device=device)
        self.pairs = torch.zeros(len(self.chosen), len(self.chosen), dtype=torch.float64, device=device)
        self.tokens = self.followers = 0
        self.repeated = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, on: Tensor) -> None:
        """Counts one window's tokens [T, F]."""
        self.on += on.sum(dim=0)
        self.tokens += len(on)
        some = on[:, self.chosen].float()
        self.pairs += (some.T @ some).double()
        size = on[1:].sum(dim=1)
        both = (on[1:] & on[:-1]).sum(dim=1)
        self.followers += int((size > 0).sum())
        self.repeated += (both / size.clamp_min(1)).double().sum()

    def activity(self, name: str) -> Activity:
        alive = self.on[self.chosen] > 0
        p = self.on[self.chosen][alive].double() / self.tokens
        both = self.pairs[alive][:, alive] / self.tokens
        both.fill_diagonal_(0.0)
        expected = float(p.sum() ** 2 - p.square().sum())
        paired = len(p) > 1
        return Activity(
            mlp=name,
            neurons=len(self.on),
            zeros=1.0 - float(self.on.sum()) / (self.tokens * len(self.on)),
            dead=int((self.on == 0).sum()),
            lift=float(both.sum()) / expected if paired else None,
            partner=float((both.max(dim=1).values / p).mean()) if paired else None,
            repeated=float(self.repeated) / self.followers if self.followers else None,
        )
