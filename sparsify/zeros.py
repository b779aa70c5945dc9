"""The zeros that are in a model already: the share of a linear's input channels that is 0, counted on text."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration import Calibration, Progress, hooked, run_batches
from sparsify.processes import ONE, Processes


class NonZero:
    """Counts the elements of tensors that are not 0; a NaN is none, so that what is broken shows."""

    def __init__(self, device: torch.device) -> None:
        # Not 0, and all.
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    def see(self, x: Tensor) -> None:
        self._counts[0] += (x != 0).sum()
        self._counts[1] += x.numel()

    def share(self, processes: Processes = ONE) -> float:
        """Returns the share over what all processes have seen."""
        counted, seen = processes.total(self._counts).tolist()
        return int(counted) / int(seen)


def nonzero_shares(
    model: PreTrainedModel, names: Iterable[str], calibration: Calibration, progress: Progress | None = None
) -> dict[str, float]:
    """Returns the share of input channels that are not 0 over all tokens, by the linears' names."""
    counters = {name: NonZero(model.device) for name in names}
    if not counters:
        return {}
    processes = calibration.processes
    with hooked({n: model.get_submodule(n) for n in counters}, lambda name, x: counters[name].see(x)):
        run_batches(model, processes.part(calibration.tokens), "calibrate", progress)
    return {name: counter.share(processes) for name, counter in counters.items()}
