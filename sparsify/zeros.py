"""The zeros that are in a model already: the share of a linear's input channels that is 0, counted on text."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration import Calibration, Progress, hooked, run_batches


class NonZero:
    """Counts the elements of tensors that are not 0; a NaN is none, so that what is broken shows."""

    def __init__(self, device: torch.device) -> None:
        self._count, self._seen = torch.zeros((), dtype=torch.int64, device=device), 0

    def see(self, x: Tensor) -> None:
        self._count += (x != 0).sum()
        self._seen += x.numel()

    @property
    def share(self) -> float:
        return float(self._count) / self._seen


def nonzero_shares(
    model: PreTrainedModel, names: Iterable[str], calibration: Calibration, progress: Progress | None = None
) -> dict[str, float]:
    """Returns the share of input channels that are not 0 over all tokens, by the linears' names."""
    counters = {name: NonZero(model.device) for name in names}
    if not counters:
        return {}
    with hooked({n: model.get_submodule(n) for n in counters}, lambda name, x: counters[name].see(x)):
        run_batches(model, calibration.tokens, "calibrate", progress)
    return {name: counter.share for name, counter in counters.items()}
