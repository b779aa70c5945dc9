"""Greedy continuations of many prompts, dense and sparse: where they part, how they repeat, how likely they are.

Scores of single tokens can stay flat while generated text falls apart. The model generates as a checkpoint would: the
prompt runs as its prefill setting says (sparse by default). No end of text is taken, so all continuations have the
same length. One batch holds all prompts of a chunk; bf16 logits depend on a batch's size in the last bit, so compare
checks made with the same settings. Not covered: sampling, chat templates, any judgement of what the text says.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.errors import SparsifyError
from sparsify.evals.generation import agreement
from sparsify.models import check_context
from sparsify.runtime import dense
from sparsify.text import Windows

_GRAM = 4


@dataclass(frozen=True)
class GenerationSettings:
    """How many prompts, how many of the first tokens of a window are one, and how many tokens are generated."""

    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 128
    batch_size: int = 16

    def check(self, model: PreTrainedModel, windows: Windows) -> None:
        """Raises SparsifyError for settings that these windows, or the model's positions, cannot meet."""
        if self.prompts < 1 or self.new_tokens < _GRAM:
            raise SparsifyError(
                f"a generation check takes at least 1 prompt and {_GRAM} new tokens, "
                f"not {self.prompts} and {self.new_tokens}"
            )
        if self.prompts > len(windows.tokens):
            raise SparsifyError(
                f"{self.prompts} prompts are asked for, {windows.name} gives {len(windows.tokens)} windows, one prompt "
                "each: use fewer prompts or a longer text"
            )
        check_context(model, self.length(windows) + self.new_tokens)

    def length(self, windows: Windows) -> int:
        """Returns the tokens of a prompt: no more than a window has."""
        return min(self.prompt_tokens, windows.seq_len)


@dataclass(frozen=True)
class Continuations:
    """prompts [N, P], tokens [N, L], and the mean negative log-likelihood in nats of tokens under the dense model."""

    prompts: Tensor
    tokens: Tensor
    nll_per_token: float

    def to_dict(self) -> dict[str, Any]:
        """Returns perplexity (under the dense model) and repetition (mean share of repeated 4-grams)."""
        shares = [repetition(row) for row in self.tokens.tolist()]
        perplexity = math.exp(self.nll_per_token) if self.nll_per_token < 700 else math.inf
        return {"perplexity": perplexity, "repetition": sum(shares) / len(shares)}


def cut_prompts(windows: Windows, settings: GenerationSettings) -> Tensor:
    """Returns prompts [N, P]: the first tokens of windows that are spread evenly over the text."""
    chosen = torch.linspace(0, len(windows.tokens) - 1, settings.prompts).round().long()
    return windows.tokens[chosen, : settings.length(windows)]


def continue_greedily(model: PreTrainedModel, prompts: Tensor, settings: GenerationSettings) -> Continuations:
    """Continues prompts [N, P] with the model as it runs now and scores what it wrote with the model run dense."""
    written: list[Tensor] = []
    nll = 0.0
    for chunk in torch.split(prompts.to(model.device), settings.batch_size):
        with torch.inference_mode():
            every = _generate(model, chunk, settings.new_tokens)
            with dense(model):
                logits = model(input_ids=every, use_cache=False, logits_to_keep=settings.new_tokens + 1).logits[:, :-1]
        written.append(every[:, chunk.shape[1] :].cpu())
        for row, ids in zip(logits, written[-1], strict=True):
            losses = F.cross_entropy(row.float(), ids.to(row.device), reduction="none")
            nll += float(losses.sum(dtype=torch.float64))
    tokens = torch.cat(written)
    return Continuations(prompts, tokens, nll / tokens.numel())


def compare_continuations(
    baseline: Continuations, other: Continuations, settings: GenerationSettings
) -> dict[str, Any]:
    """Returns the check of one model as JSON values.

    agreement: tokens until a continuation parts from the dense one, mean over prompts; never_parted: how many do not.
    """
    lengths = [agreement(a, b) for a, b in zip(baseline.tokens.tolist(), other.tokens.tolist(), strict=True)]
    return {
        "settings": asdict(settings),
        "agreement": sum(lengths) / len(lengths),
        "never_parted": sum(length == settings.new_tokens for length in lengths),
        **other.to_dict(),
        "dense": baseline.to_dict(),
    }


def repetition(tokens: Sequence[int]) -> float:
    """Returns the share of 4-grams that stood in the sequence before, in [0, 1)."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams)


def _generate(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """Returns prompts and continuations [N, P + L]."""
    every: Tensor = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return every
