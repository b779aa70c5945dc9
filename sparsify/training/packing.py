"""Training text as windows of tokens: streamed, shuffled, packed to the context length, without end.

Documents of a text are shuffled through a buffer, tokenised and joined, each closed by EOS; windows are cut from that
stream, each with BOS first where the tokenizer adds one, as evaluation makes them. When the text is over it begins
again in another order. The windows depend on text, tokenizer, context and seed only, so that a run that goes on from
a checkpoint sees the windows that it would have seen. Not covered: chat templates, masks for padding (there is none).
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from sparsify.errors import SparsifyError
from sparsify.text import adds_bos

_BUFFER = 2048
_AT_ONCE = 64


@dataclass(frozen=True)
class Source:
    """Documents that can be read again and again, and their name."""

    name: str
    documents: Iterable[str]


class PackedText(IterableDataset[dict[str, Tensor]]):
    """Yields {"input_ids", "labels"}, both int64 [context], for ever.

    Raises SparsifyError, when it is read, for a text that does not fill one window.
    """

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, *, context: int, seed: int) -> None:
        self._source, self._tokenizer, self._context, self._seed = source, tokenizer, context, seed
        self._first = [int(tokenizer.bos_token_id)] if adds_bos(tokenizer) else []
        end = tokenizer.eos_token_id
        self._last = [] if end is None else [int(end)]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        body = self._context - len(self._first)
        left: list[int] = []
        epoch = 0
        while True:
            windows = 0
            for ids in self._tokens(random.Random(f"{self._seed} {epoch}")):
                left += ids
                start = 0
                while len(left) - start >= body:
                    window = torch.tensor([*self._first, *left[start : start + body]])
                    yield {"input_ids": window, "labels": window}
                    start += body
                    windows += 1
                left = left[start:]
            if not windows and epoch:
                raise SparsifyError(
                    f"training text {self._source.name} is too short: it does not fill one window of {self._context} "
                    "tokens; use a longer text or a shorter --context"
                )
            epoch += 1

    def _tokens(self, generator: random.Random) -> Iterator[list[int]]:
        waiting: list[str] = []
        for document in _shuffled(self._source.documents, generator):
            waiting.append(document)
            if len(waiting) == _AT_ONCE:
                yield from self._encode(waiting)
                waiting = []
        if waiting:
            yield from self._encode(waiting)

    def _encode(self, documents: list[str]) -> Iterator[list[int]]:
        encoded = self._tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            yield [*ids, *self._last]


def _shuffled(documents: Iterable[str], generator: random.Random) -> Iterator[str]:
    """Yields the documents in random order, as far as a buffer of them reaches."""
    buffer: list[str] = []
    for document in documents:
        if len(buffer) < _BUFFER:
            buffer.append(document)
            continue
        index = generator.randrange(_BUFFER)
        yield buffer[index]
        buffer[index] = document
    generator.shuffle(buffer)
    yield from buffer
