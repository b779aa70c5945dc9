"""A named shape with random weights as what is measured: for speed at real sizes where no trained model is at hand.

TEAL's thresholds for several sparsities are fitted on the positions that decode steps have, and share one copy of the
weights; other methods have one sparsity. Only speed and bytes mean something: what such a model writes is noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsify.conversion import convert
from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals.machine import available_memory
from sparsify.evals.shapes import (
    random_calibration,
    random_model,
    random_tokens,
    shape_config,
    sparse_random_model,
    teal_thresholds,
)
from sparsify.methods import get_method
from sparsify.methods.teal import Teal

# Of the weights' size, what converting one linear at a time takes beside them; and what must stay free.
_SHARE, _RESERVE = 1.2, 1 << 30
_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LEAST_WINDOW = 16


@dataclass(frozen=True)
class Subject:
    """The converted model, tokens [B, S], TEAL's thresholds by sparsity and layer, and what makes its dense copy."""

    model: PreTrainedModel
    tokens: Tensor
    thresholds: dict[float, dict[str, float]] | None
    dense: Callable[[], PreTrainedModel]


def random_subject(
    name: str,
    *,
    sparsities: Sequence[float],
    method: str = "teal",
    dtype: str = "auto",
    prompt_tokens: int,
    length: int,
    batch: int = 1,
    device: str | torch.device = "cpu",
) -> Subject:
    """Returns the shape on a device, converted at these sparsities, with `batch` sequences of `length` random tokens.

    Raises SparsifyError for an unknown shape, method or sparsity, UnavailableError where memory is short.
    """
    configured = [get_method(method).configure(sparsity=sparsity) for sparsity in sparsities]
    if not configured or (len(configured) > 1 and method != "teal"):
        raise SparsifyError(f"{method} has one sparsity in a run: give one --sparsity, or --method teal for several")
    _check_memory(name, _DTYPES[dtype], torch.device(device))

    def make() -> PreTrainedModel:
        return random_model(name, dtype=_DTYPES[dtype], device=device)

    if method != "teal":
        model = sparse_random_model(name, sparsities[0], method, dtype=_DTYPES[dtype], device=device)
        return Subject(model, random_tokens(model, batch, length, seed=1), None, make)
    model = make()
    calibration = random_calibration(model, length=max(length, _LEAST_WINDOW))
    thresholds = teal_thresholds(model, calibration, sparsities, skip=prompt_tokens)
    # Its own thresholds are replaced by those above: a short text is enough.
    convert(model, Teal(sparsities[0]), random_calibration(model, windows=1, length=_LEAST_WINDOW))
    return Subject(model, random_tokens(model, batch, length, seed=1), thresholds, make)


def weight_bytes(name: str, dtype: torch.dtype) -> int:
    """Returns the bytes of a shape's weights. Raises SparsifyError for an unknown name."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name), dtype=dtype)  # type: ignore[no-untyped-call]
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _check_memory(name: str, dtype: torch.dtype, device: torch.device) -> None:
    needed, free = int(_SHARE * weight_bytes(name, dtype)) + _RESERVE, available_memory(device)
    if free is not None and free < needed:
        raise UnavailableError(
            f"{name} needs {needed / 1e9:.1f} GB of free memory, {free / 1e9:.1f} GB are there: use a smaller shape"
        )
