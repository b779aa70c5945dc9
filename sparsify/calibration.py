"""Calibration text as tokens, and the statistics that a conversion streams from it.

No activation is kept: the first pass counts scores into histograms, the second sums squared errors.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.errors import SparsifyError
from sparsify.processes import ONE, Processes
from sparsify.text import Text, windows

Progress = Callable[[str, int, int], None]

# Bins are the upper 16 bits of a positive float32: 8 exponent and 8 mantissa bits, so a bin is at most 0.4% wide
# and no range has to be known before the first batch.
_SHIFT = 15
_BINS = 1 << 16
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Calibration:
    """Token windows [N, S] (int64) that the model is run on, and where they came from.

    processes: those that convert the model together, each of which runs a part of the windows.
    """

    tokens: Tensor
    source: str
    processes: Processes = ONE

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.tokens.numel() == 0 or self.tokens.dtype != torch.int64:
            raise SparsifyError(
                f"calibration tokens must be int64 of shape [windows, tokens], not {self.tokens.dtype} "
                f"of shape {list(self.tokens.shape)}"
            )

    @classmethod
    def from_text(
        cls, text: Text, tokenizer: PreTrainedTokenizerBase, *, sequences: int = 32, seq_len: int = 512, seed: int = 0
    ) -> "Calibration":
        """Returns `sequences` windows of `seq_len` tokens of the text, in the order of the text.

        Seed 0 spreads them evenly; every other seed draws them at random, without replacement.
        Raises SparsifyError where the text is too short for that many, or leaves another seed nothing to draw.
        """
        if sequences < 1:
            raise SparsifyError(f"the number of calibration sequences must be at least 1, not {sequences}")
        every = windows(text, tokenizer, seq_len=seq_len).tokens
        if len(every) < sequences:
            raise SparsifyError(
                f"calibration text {text.name} gives {len(every)} windows of {seq_len} tokens, {sequences} are asked "
                f"for: use a longer text, --sequences {len(every)} or a shorter --seq-len"
            )
        if seed == 0:
            chosen = torch.linspace(0, len(every) - 1, sequences).round().long()
        elif len(every) == sequences:
            raise SparsifyError(
                f"calibration text {text.name} gives just the {sequences} windows of {seq_len} tokens that are asked "
                f"for: seed {seed} would draw the same ones; use a longer text or --sequences {sequences // 2}"
            )
        else:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(every), generator=generator)[:sequences].sort().values
        return cls(every[chosen], text.name)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the calibration: source, shape and SHA-256 of the token ids as little-endian int64."""
        data = self.tokens.cpu().contiguous().numpy().astype("<i8").tobytes()
        count, length = self.tokens.shape
        return {
            "source": self.source,
            "sequences": count,
            "seq_len": length,
            "sha256": hashlib.sha256(data).hexdigest(),
        }


class ShuffledWindows:
    """Windows [N, S] in random order, as many at once as are asked for: each is drawn once before any is again."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self._generator = torch.Generator().manual_seed(0)
        self._queue: list[int] = []

    def next(self, count: int) -> Tensor:
        """Returns the next windows [count, S]."""
        while len(self._queue) < count:
            self._queue += torch.randperm(len(self._tokens), generator=self._generator).tolist()
        chosen, self._queue = self._queue[:count], self._queue[count:]
        return self._tokens[chosen]


class ScoreHistogram:
    """A streamed histogram of non-negative scores, and its quantiles."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, scores: Tensor) -> None:
        """Counts scores of any shape; a NaN counts as the largest."""
        bits = scores.detach().float().abs().contiguous().view(torch.int32) >> _SHIFT
        self.counts += torch.bincount(bits.flatten(), minlength=_BINS).cpu()

    def add_up(self, processes: Processes) -> None:
        """Makes this the histogram of all processes together."""
        self.counts = processes.total(self.counts)

    @property
    def finite(self) -> bool:
        """Whether no score was infinite or NaN."""
        return not bool(self.counts[_INFINITY >> _SHIFT :].any())

    def threshold(self, density: float) -> float:
        """Returns t such that a share `density` of the scores is > t, linear inside a bin; -1 where all are kept."""
        total = int(self.counts.sum())
        if density >= 1.0:
            return -1.0
        below = (1.0 - density) * total
        cumulative = self.counts.cumsum(0)
        index = int(torch.searchsorted(cumulative, torch.tensor(below, dtype=torch.float64)).clamp(max=_BINS - 1))
        before = float(cumulative[index] - self.counts[index])
        inside = (below - before) / max(float(self.counts[index]), 1.0)
        low, high = _edge(index), _edge(index + 1)
        # The zeros' bin holds exact zeros (ReLU) before anything else: a cut inside it drops just them.
        return low if index == 0 else low + inside * (high - low)


def _edge(index: int) -> float:
    # The bins above infinity's hold NaN: their edge is one past the last.
    return float(torch.tensor(min(index << _SHIFT, _INFINITY), dtype=torch.int32).view(torch.float32))


@contextmanager
def hooked(modules: dict[str, nn.Module], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Inside, see(name, input) is called before each forward of the modules."""
    handles = []
    for name, module in modules.items():

        def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            see(name, args[0])

        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_batches(model: PreTrainedModel, tokens: Tensor, stage: str, progress: Progress | None) -> None:
    """Runs the model over tokens [N, S], a window at a time, without a cache."""
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        for index, window in enumerate(tokens):
            with torch.inference_mode():
                model.base_model(input_ids=window[None].to(model.device), use_cache=False)
            if progress is not None:
                progress(stage, index + 1, len(tokens))
    finally:
        model.train(was_training)
