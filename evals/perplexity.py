"""Perplexity of a dense or converted causal LM over windows of a text, in two named protocols.

every-token: one forward a window, every token sparse, whatever prefill the model is set to. Scored: what the windows
score. decode: the first half of each window is a dense prefill into a KV cache, the second half then runs sparse on
that cache, in one forward. Scored: the tokens that a sparse position predicts, which is the second half without its
first token (the prefill predicts that one). A method that chooses per prompt has the first half as its prompt, and no
meaning in every-token, which is refused. Compare with a dense baseline of the same protocol: the same call inside
`sparsify.runtime.dense(model)`, or with the dense model. Numbers of different protocols never mix.
Not covered: sliding contexts longer than a window, and accuracy tasks (`lm_eval_run`).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sparsify.errors import SparsifyError, suggest
from sparsify.models import check_context
from sparsify.prompt_choice import chooses_per_prompt
from sparsify.runtime import dense, sparse_layers, switch_of, with_prefill
from sparsify.text import Windows

Protocol = Literal["every-token", "decode"]
See = Callable[[Tensor, Tensor, Tensor], None]

# Logits of one forward, in elements: 512 MB in bf16, 1 GB in fp32. A larger batch runs in smaller ones.
_MAX_LOGITS = 1 << 28


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and everything it depends on. nll is in nats; scored says which tokens count."""

    perplexity: float
    nll_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int
    byte_count: str
    protocol: str
    scored: str
    sparse: bool
    windows: int
    seq_len: int
    stride: int
    bos: bool
    text: str
    text_sha256: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    model: PreTrainedModel,
    windows: Windows,
    *,
    protocol: str = "every-token",
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    see: See | None = None,
) -> Perplexity:
    """Measures the model on the windows; the log-softmax is fp32, its sum fp64. Batches change no scored token.

    progress is called with (windows done, windows in all) after each batch; see with (tokens [B, S], logits
    [B, S, V], scored [B, S]) of each, once its sum is known to be finite. Raises SparsifyError for an unknown
    protocol, windows that the model cannot take, or logits that are not finite.
    """
    _check(model, windows, protocol, batch_size)
    scored = _scored(windows, protocol)
    tokens = int(scored.sum())
    if not tokens:
        raise SparsifyError(f"windows of {windows.seq_len} tokens leave nothing to score with protocol {protocol!r}")
    size = _batch_size(model, windows, batch_size)
    total = 0.0
    with _evaluating(model), torch.inference_mode():
        for start, rows in zip(range(0, len(scored), size), batches_of(model, windows, batch_size), strict=True):
            batch = rows.to(model.device)
            logits = batch_logits(model, batch, protocol)
            total += _nll(logits, batch, scored[start : start + size])
            if not math.isfinite(total):
                raise SparsifyError(
                    f"the model's logits are not finite in windows {start} to {start + len(batch) - 1}: "
                    "check the checkpoint, or load it in another dtype"
                )
            if see is not None:
                see(batch, logits, scored[start : start + size])
            if progress is not None:
                progress(start + len(batch), len(scored))
    size_bytes = int(windows.token_bytes[scored].sum())
    return Perplexity(
        perplexity=math.exp(total / tokens) if total / tokens < 700 else math.inf,
        nll_per_token=total / tokens,
        bits_per_byte=total / math.log(2) / max(size_bytes, 1),
        tokens=tokens,
        bytes=size_bytes,
        byte_count=windows.byte_count,
        protocol=protocol,
        scored=_statement(windows, protocol),
        sparse=bool(sparse_layers(model)) and not switch_of(model).forced_dense,
        windows=len(scored),
        seq_len=windows.seq_len,
        stride=windows.stride,
        bos=windows.bos,
        text=windows.name,
        text_sha256=windows.sha256,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def batches_of(model: PreTrainedModel, windows: Windows, batch_size: int = 8) -> list[Tensor]:
    """Returns the batches of tokens [B, S] in which `perplexity` runs the windows."""
    size = _batch_size(model, windows, batch_size)
    return [windows.tokens[start : start + size] for start in range(0, len(windows.tokens), size)]


def _batch_size(model: PreTrainedModel, windows: Windows, most: int) -> int:
    return max(1, min(most, _MAX_LOGITS // (windows.seq_len * _vocabulary(model))))


def decode_logits(model: PreTrainedModel, batch: Tensor, prompt: int) -> Tensor:
    """Returns logits [B, S, V] of tokens [B, S]: the first `prompt` dense into a cache, the rest sparse on it.

    The logits of the prompt are zeros. Under `dense(model)` all tokens run dense, in the same two forwards.
    """
    cache = DynamicCache(config=model.config)
    with dense(model):
        model(input_ids=batch[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    with with_prefill(model, "sparse"):
        logits: Tensor = model(input_ids=batch[:, prompt:], past_key_values=cache, use_cache=True).logits
    return F.pad(logits, (0, 0, prompt, 0))


def check_protocol(protocol: str) -> None:
    """Raises SparsifyError for a protocol that there is not."""
    allowed = get_args(Protocol)
    if protocol not in allowed:
        raise SparsifyError(
            f"unknown protocol {protocol!r}: allowed are {', '.join(allowed)}.{suggest(protocol, allowed)}"
        )


def check_sparse_protocol(model: PreTrainedModel, protocol: str) -> None:
    """Raises SparsifyError for a protocol that there is not, or that the model's method has no meaning in."""
    check_protocol(protocol)
    if protocol == "every-token" and chooses_per_prompt(model):
        raise SparsifyError(
            "protocol every-token has no prompt, and this model's neurons are chosen by one: use --protocol decode, "
            "where the dense first half of each window chooses for the second"
        )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.train(False)
    try:
        with with_prefill(model, "sparse"):
            yield
    finally:
        model.train(was_training)


def batch_logits(model: PreTrainedModel, batch: Tensor, protocol: str) -> Tensor:
    """Returns the logits [B, S, V] of tokens [B, S] in a protocol; decode's first half, never scored, are zeros."""
    if protocol == "every-token":
        every: Tensor = model(input_ids=batch, use_cache=False).logits
        return every
    return decode_logits(model, batch, batch.shape[1] // 2)


def _nll(logits: Tensor, batch: Tensor, scored: Tensor) -> float:
    """Returns the summed negative log-likelihood in nats of the scored tokens, scored [B, S] bool."""
    total = 0.0
    # A window at a time: the fp32 copy of a batch's logits would be the largest tensor of all.
    for row, ids, chosen in zip(logits, batch, scored.to(batch.device), strict=True):
        losses = F.cross_entropy(row[:-1][chosen[1:]].float(), ids[1:][chosen[1:]], reduction="none")
        total += float(losses.sum(dtype=torch.float64))
    return total


def _scored(windows: Windows, protocol: str) -> Tensor:
    scored = windows.scored.clone()
    if protocol == "decode":
        scored[:, : windows.seq_len // 2 + 1] = False
    return scored


def _statement(windows: Windows, protocol: str) -> str:
    if protocol == "decode":
        half = windows.seq_len // 2
        return (
            f"positions {half + 1} to {windows.seq_len - 1} of each window"
            f"{'' if windows.stride >= windows.seq_len - half else f', its last {windows.stride} at most'}: "
            f"dense prefill of {half} tokens, then all sparse"
        )
    if windows.stride >= windows.seq_len - windows.bos:
        return f"positions 1 to {windows.seq_len - 1} of each window, all tokens sparse"
    return f"the last {windows.stride} tokens of each window (all of the first), all tokens sparse"


def _check(model: PreTrainedModel, windows: Windows, protocol: str, batch_size: int) -> None:
    check_protocol(protocol)
    if not (sparse_layers(model) and switch_of(model).forced_dense):
        check_sparse_protocol(model, protocol)
    if batch_size < 1:
        raise SparsifyError(f"the batch size must be at least 1, not {batch_size}")
    check_context(model, windows.seq_len)
    largest = int(windows.tokens.max())
    if largest >= _vocabulary(model):
        raise SparsifyError(
            f"token id {largest} of text {windows.name} is outside this model's vocabulary of {_vocabulary(model)}: "
            "the tokenizer is not this model's"
        )


def _vocabulary(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])
