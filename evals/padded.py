"""A window for each document, padded on the right to one length. Pads are scored nowhere and counted nowhere.

Attention is causal, so what stands behind a document changes none of its tokens. Not covered: a document's tokens
beyond the window's length, which are left out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.errors import SparsifyError
from sparsify.text import Text, Windows, adds_bos, windows


@dataclass(frozen=True, eq=False)
class PaddedWindows(Windows):
    """Windows [N, S] whose first lengths[n] tokens are real."""

    lengths: Tensor

    @property
    def real(self) -> Tensor:
        """Which tokens are no padding, bool [N, S]."""
        return torch.arange(self.seq_len) < self.lengths[:, None]

    @property
    def scored(self) -> Tensor:
        """Which tokens are scored, bool [N, S]."""
        return super().scored & self.real


def document_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, limit: int | None = None
) -> PaddedWindows:
    """Returns a window of at most seq_len tokens for each of the first `limit` documents of two tokens or more.

    Raises SparsifyError where there is none, and for a bad seq_len or limit.
    """
    if limit is not None and limit < 1:
        raise SparsifyError(f"the number of windows must be at least 1, not {limit}")
    bos = adds_bos(tokenizer)
    parts: list[Windows] = []
    for document in text.documents:
        if len(parts) == limit:
            break
        count = len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]) + bos
        if count > 1:
            parts.append(windows(Text(text.name, [document]), tokenizer, seq_len=min(seq_len, count), limit=1))
    if not parts:
        raise SparsifyError(f"text {text.name} is too short: none of its documents has 2 tokens; use another text")
    lengths = torch.tensor([part.seq_len for part in parts])
    longest = int(lengths.max())

    def padded(rows: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(row, (0, longest - row.shape[1])) for row in rows])

    return PaddedWindows(
        tokens=padded([part.tokens for part in parts]),
        scored_from=torch.ones(len(parts), dtype=torch.int64),
        token_bytes=padded([part.token_bytes for part in parts]),
        stride=longest,
        bos=bos,
        byte_count=parts[0].byte_count,
        name=text.name,
        sha256=text.sha256,
        lengths=lengths,
    )
