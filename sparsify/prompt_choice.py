"""The neurons that a prompt chooses for its sequence, and when (GRIFFIN, arXiv 2404.01365).

s_j = ‖(h_1j/‖h_1‖, …, h_Tj/‖h_T‖)‖ over the T tokens of a sequence that ran dense, where h_t [F] enters down; the k
largest are kept for its tokens that run sparse. A choice belongs to a KV cache: it is held by the cache object, starts
anew where the cache is empty, and goes where the cache goes. Each sequence of a batch has its own; padding has no part.
Not covered: sequences of a cache that change places, but for the beams of one prompt; masks of more dimensions than 2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.token_cut import top_k_mask

_ATTRIBUTE = "_sparsify_prompt"
_LEAST_NORM = torch.finfo(torch.float32).tiny


def squared_shares(h: Tensor) -> Tensor:
    """Returns (h_j/‖h‖)² [..., F] in fp32 of neurons h [..., F]; 0 where all are 0."""
    return F.normalize(h.detach().float(), dim=-1, eps=_LEAST_NORM).square()


class _Prompt:
    """What one cache's dense tokens have chosen: Σ (h_j/‖h‖)² and the mask made of it, both [B, F], by MLP."""

    def __init__(self) -> None:
        self.squares: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}


class PromptChoices:
    """The choices of the forward that runs now. One object, shared by the layers of a model; hooks of it set it."""

    def __init__(self) -> None:
        self.prompt: _Prompt | None = None
        # Whether the forward's cache was empty.
        self.fresh = False
        self.batch = self.length = 0
        # The tokens [B, S] that are no padding; None for all.
        self.real: Tensor | None = None
        self.problem: str | None = None

    def begins(self, prefill: str) -> bool:
        """Whether the forward is the start of a prompt that runs dense, were it of one token."""
        return self.fresh and prefill == "dense"

    def add(self, mlp: str, h: Tensor) -> None:
        """Adds tokens h [..., F] that ran dense; outside of a forward of the model, nothing."""
        prompt = self.prompt
        if prompt is None:
            return
        if self.problem is not None:
            raise SparsifyError(self.problem)
        seen, tokens = h[..., 0].numel(), self.batch * self.length
        if seen != tokens:
            raise SparsifyError(
                f"{mlp} sees {seen} of {tokens} tokens, so whose neurons are whose is not known: use a method that "
                "chooses for each token, such as cats or teal"
            )
        squares = squared_shares(h.reshape(self.batch, -1, h.shape[-1]))
        if self.real is not None:
            squares = torch.where(self.real[..., None], squares, 0.0)
        total = squares.sum(dim=1)
        before = prompt.squares.get(mlp)
        if before is not None:
            self._check_batch(before)
            total = total + before
        prompt.squares[mlp] = total
        prompt.masks.pop(mlp, None)

    def keep(self, mlp: str, shape: torch.Size, k: Tensor) -> Tensor:
        """Returns the neurons [..., F] that the prompts chose, bool; shape [...] is that of the tokens.

        Raises SparsifyError where no token of these sequences ran dense.
        """
        prompt = self.prompt
        if prompt is None or mlp not in prompt.squares:
            raise SparsifyError(
                "no prompt has chosen neurons for these tokens: a method that chooses per prompt needs tokens that run "
                "dense first, in the same KV cache: evaluate with --protocol decode, and run prompts with prefill dense"
            )
        if mlp not in prompt.masks:
            prompt.masks[mlp] = top_k_mask(prompt.squares[mlp], k)
        mask = prompt.masks[mlp]
        self._check_batch(mask)
        tokens = shape.numel() // max(self.batch, 1)
        return mask[:, None].expand(-1, tokens, -1).reshape(*shape, mask.shape[-1])

    def _check_batch(self, chosen: Tensor) -> None:
        if len(chosen) != self.batch:
            raise SparsifyError(
                f"{self.batch} sequences run on the cache of {len(chosen)} prompts, so whose neurons are whose is not "
                "known: run each prompt with a cache of its own"
            )


def chooses_per_prompt(model: nn.Module) -> bool:
    """Whether the model's layers run sparse only after a prompt that ran dense."""
    return isinstance(getattr(model, "prompt_choices", None), PromptChoices)


def follow_prompts(model: nn.Module, choices: PromptChoices) -> None:
    """Lets the model's forwards set `choices`, which its layers share."""
    # On the model, so that the hooks of a deep copy find the copy's own.
    model.prompt_choices = choices  # type: ignore[assignment]
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    # Also after an error, whose prompt must not be the next forward's.
    model.register_forward_hook(_end, with_kwargs=True, always_call=True)


def _begin(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    choices: PromptChoices = model.prompt_choices
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    tokens = next(tensor for tensor in given if tensor is not None)
    choices.fresh = cache is None or int(cache.get_seq_length()) == 0
    choices.prompt = _Prompt() if choices.fresh else getattr(cache, _ATTRIBUTE, None) or _Prompt()
    choices.batch, choices.length = tokens.shape[:2]
    choices.real = choices.problem = None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        choices.real = mask[:, -tokens.shape[1] :] != 0
    elif mask is not None:
        choices.problem = (
            "a prompt that chooses neurons needs an attention mask of two dimensions [sequences, tokens], which says "
            "what is padding: pass that one, or generate without a static cache"
        )


def _end(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    choices: PromptChoices = model.prompt_choices
    cache = kwargs.get("past_key_values")
    for part in output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]:
        cache = part if cache is None and hasattr(part, "get_seq_length") else cache
    if cache is not None and output is not None:
        setattr(cache, _ATTRIBUTE, choices.prompt)
    choices.prompt, choices.fresh = None, False
