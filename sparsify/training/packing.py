"""Training text as windows of tokens: streamed, shuffled, packed to the context length, without end.

Documents of a text are shuffled through a buffer, tokenised and joined, each closed by EOS; windows are cut from that
stream, each with BOS first where the tokenizer adds one, as evaluation makes them, and shuffled through a buffer, too:
else a batch would be neighbours of one document. When the text is over it begins again in another order. The windows
depend on text, tokenizer, context and seed only, so that a run that goes on from a checkpoint sees the windows that it
would have seen. Not covered: chat templates, masks for padding (there is none).
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from sparsify.errors import SparsifyError
from sparsify.text import adds_bos

_DOCUMENTS, _WINDOWS = 2048, 1024
_AT_ONCE = 64
T = TypeVar("T")


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
        left: list[int] = []
        epoch = 0
        while True:
            generator = random.Random(f"{self._seed} {epoch}")
            some = False
            for window in _shuffled(self._windows(left, generator), random.Random(f"{epoch} {self._seed}"), _WINDOWS):
                some = True
                yield {"input_ids": window, "labels": window}
            if not some and epoch:
                raise SparsifyError(
                    f"training text {self._source.name} is too short: it does not fill one window of {self._context} "
                    "tokens; use a longer text or a shorter --context"
                )
            epoch += 1

    def _windows(self, left: list[int], generator: random.Random) -> Iterator[Tensor]:
        """Yields the windows [context] of an epoch; what the last one leaves stays in `left`, for the next epoch."""
        body = self._context - len(self._first)
        for ids in self._tokens(generator):
            left += ids
            start = 0
            while len(left) - start >= body:
                yield torch.tensor([*self._first, *left[start : start + body]])
                start += body
            del left[:start]

    def _tokens(self, generator: random.Random) -> Iterator[list[int]]:
        waiting: list[str] = []
        for document in _shuffled(self._source.documents, generator, _DOCUMENTS):
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


def _shuffled(items: Iterable[T], generator: random.Random, size: int) -> Iterator[T]:
    """Yields the items in random order, as far as a buffer of `size` of them reaches."""
    buffer: list[T] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        index = generator.randrange(size)
        yield buffer[index]
        buffer[index] = item
    generator.shuffle(buffer)
    yield from buffer
