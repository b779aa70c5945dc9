"""The same prompt continued by the dense and by the sparse model, side by side.

Greedy or sampled with one seed for both; tokens per second include the prefill and are one run each: `speed` measures.
Not covered: chat templates, beams, and any judgement of quality.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.errors import SparsifyError
from sparsify.models import check_context
from sparsify.runtime import dense, sparse_layers, switch_of


@dataclass(frozen=True)
class Continuation:
    """What one model wrote after the prompt."""

    text: str
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


@dataclass(frozen=True)
class SideBySide:
    """Both continuations; agreement is the number of tokens before they first differ. A dense model has one side."""

    prompt: str
    prompt_tokens: int
    dense: Continuation
    sparse: Continuation | None
    agreement: int | None
    temperature: float
    seed: int
    prefill: str | None

    def to_dict(self) -> dict[str, Any]:
        result = asdict(self)
        for name, run in (("dense", self.dense), ("sparse", self.sparse)):
            if run is not None:
                result[name]["tokens_per_second"] = run.tokens_per_second
        return result


def side_by_side(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> SideBySide:
    """Continues the prompt with the model run dense, then sparse; a dense model alone. temperature 0 is greedy.

    Raises SparsifyError for an empty prompt, a bad setting, or a sequence longer than the model's positions.
    """
    converted = bool(sparse_layers(model))
    _check(max_new_tokens, temperature, top_p)
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(model.device)
    if not ids.numel():
        raise SparsifyError("the prompt holds no tokens: give some text")
    check_context(model, ids.shape[1] + max_new_tokens)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings["pad_token_id"] = pad if pad is not None else 0
    first = _continue(model, tokenizer, ids, settings, seed, run_dense=True)
    second = _continue(model, tokenizer, ids, settings, seed, run_dense=False) if converted else None
    return SideBySide(
        prompt=prompt,
        prompt_tokens=ids.shape[1],
        dense=first,
        sparse=second,
        agreement=agreement(first.tokens, second.tokens) if second else None,
        temperature=temperature,
        seed=seed,
        prefill=switch_of(model).prefill if converted else None,
    )


def agreement(first: list[int], second: list[int]) -> int:
    """Returns how many tokens two continuations share before they first differ."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    settings: dict[str, Any],
    seed: int,
    *,
    run_dense: bool,
) -> Continuation:
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        with dense(model) if run_dense else nullcontext():
            # Unmeasured: the first steps of a process set up threads and caches; on a GPU, kernels are compiled and
            # graphs made for this length and this way to choose.
            few = {"max_new_tokens": 2, "do_sample": False}
            _generate(model, ids, settings | (few if model.device.type == "cpu" else {}))
            torch.manual_seed(seed)
            started = time.perf_counter()
            tokens = _generate(model, ids, settings)
            seconds = time.perf_counter() - started
    return Continuation(str(tokenizer.decode(tokens, skip_special_tokens=True)), tokens, seconds)


def _generate(model: Any, ids: Tensor, settings: dict[str, Any]) -> list[int]:
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise SparsifyError(f"the number of new tokens must be at least 1, not {max_new_tokens}")
    if temperature < 0:
        raise SparsifyError(f"the temperature must be 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise SparsifyError(f"top_p must be in (0, 1], not {top_p}")
