"""What a report draws of a sparse model's activations and weights, collected on a text: one pass, nothing kept.

Scores are counted relative to the threshold of their linear, in logarithmic bins, so that all linears compare.
Realised sparsity is counted by the position of a token in its window. Singular values are those of the middle layer's
linears. Not covered: thresholds that depend on the token or cut whole neurons, which have no histogram.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration import hooked, run_batches
from sparsify.config import SparsifyConfig
from sparsify.errors import SparsifyError
from sparsify.evals.report_text import place
from sparsify.kernels.reference import scores
from sparsify.ledger import ledger_of
from sparsify.runtime import sparse_layers, with_prefill
from sparsify.text import Windows

# log10 of score / threshold; what is outside is counted in the bin at the end.
LOW, HIGH, BINS = -3.0, 2.0, 50
_SINGULAR_VALUES = 128

Progress = Callable[[str, int, int], None]


class _Counts:
    """What one linear's forwards add up to; by_position [S] counts kept channels."""

    def __init__(self, seq_len: int) -> None:
        self.kept, self.all, self.zeros = 0, 0, 0
        self.by_position = torch.zeros(seq_len, dtype=torch.float64)
        self.positioned = 0
        self.histogram = torch.zeros(BINS, dtype=torch.int64)

    def add_keep(self, keep: Tensor) -> None:
        rows = keep.reshape(-1, keep.shape[-1])
        self.kept += int(rows.sum())
        self.all += rows.numel()
        # Experts see only some of the tokens: their rows have no position.
        if len(rows) == len(self.by_position):
            self.by_position += rows.sum(-1).double().cpu()
            self.positioned += rows.shape[-1]

    def add_scores(self, score: Tensor, threshold: float) -> None:
        self.zeros += int((score == 0).sum())
        ratio = (score[score > 0].float() / threshold).log10()
        index = ((ratio - LOW) / (HIGH - LOW) * BINS).long().clamp(0, BINS - 1)
        self.histogram += torch.bincount(index.flatten(), minlength=BINS).cpu()


def collect_activations(model: PreTrainedModel, windows: Windows, progress: Progress | None = None) -> dict[str, Any]:
    """Returns densities, histograms, sparsity by position [S] and singular values of a converted model.

    Every token runs sparse, whatever prefill the model is set to. Raises SparsifyError for a dense model, and for one
    whose neurons are chosen by prompts.
    """
    layers = sparse_layers(model)
    if not layers:
        raise SparsifyError("activations are those of a converted checkpoint: convert the model first")
    config = model.config.quantization_config
    assert isinstance(config, SparsifyConfig)
    if config.neurons is not None and config.neurons.cut == "prompt-top-k":
        raise SparsifyError(
            f"prompts choose the neurons of {config.method}, and whole windows are no prompts: its activations are not "
            "collected; `sparsify eval --protocol decode` measures its realised sparsity"
        )
    counts = {name: _Counts(windows.seq_len) for name in layers}
    fixed = {
        name: float(layer.threshold)
        for name, layer in layers.items()
        if config.neurons is None and config.linears[name].cut is None and float(layer.threshold) > 0
    }

    def see(name: str, x: Tensor) -> None:
        layer = layers[name]
        if not layer.runs_sparse or x.numel() == 0:
            return
        counts[name].add_keep(layer.keep(x))
        if name in fixed:
            counts[name].add_scores(scores(x, layer.scale), fixed[name])

    # Whole windows, every token sparse, as in the protocol every-token.
    with with_prefill(model, "sparse"), hooked(dict(layers), see):
        run_batches(model, windows.tokens, "activations", progress)
    ledger = ledger_of(model)
    return {
        "text": windows.name,
        "text_sha256": windows.sha256,
        "windows": len(windows.tokens),
        "seq_len": windows.seq_len,
        "tokens": windows.tokens.numel(),
        "bins": [LOW, HIGH, BINS],
        "activations": {name: _linear(found, fixed.get(name)) for name, found in counts.items() if found.all},
        "nominal_sparsity": ledger.nominal_sparsity,
        "weighted_sparsity": ledger.weighted_sparsity,
        "sparsity_by_position": [
            ledger.with_densities(_at(counts, position)).weighted_sparsity for position in range(windows.seq_len)
        ],
        "singular_values": _singular_values(model, progress),
    }


def _linear(found: _Counts, threshold: float | None) -> dict[str, Any]:
    return {
        "density": found.kept / found.all,
        "threshold": threshold,
        "zeros": None if threshold is None else found.zeros / found.all,
        "histogram": None if threshold is None else [count / found.all for count in found.histogram.tolist()],
    }


def _at(counts: dict[str, _Counts], position: int) -> dict[str, float]:
    return {
        name: float(found.by_position[position]) / found.positioned
        for name, found in counts.items()
        if found.positioned
    }


def _singular_values(model: PreTrainedModel, progress: Progress | None) -> dict[str, Any]:
    """Returns the middle layer's singular values over the largest, at ranks that are spread on a logarithmic scale."""
    layers = sparse_layers(model)
    numbers = sorted({number for name in layers if (number := place(name)[0]) is not None})
    middle = numbers[len(numbers) // 2] if numbers else None
    chosen = {name: layer for name, layer in layers.items() if place(name)[0] == middle}
    found = {}
    for index, (name, layer) in enumerate(chosen.items()):
        values = torch.linalg.svdvals(layer.tensors().weight.detach().float())
        steps = torch.logspace(0, torch.log10(torch.tensor(float(len(values)))), _SINGULAR_VALUES)
        ranks = sorted({min(max(round(step), 1), len(values)) for step in steps.tolist()})
        largest = max(float(values[0]), torch.finfo(torch.float32).tiny)
        found[name] = {"rank": layer.rank, "at": ranks, "values": [float(values[r - 1]) / largest for r in ranks]}
        if progress is not None:
            progress("singular values", index + 1, len(chosen))
    return found
