"""Text to calibrate and to evaluate on: where it comes from, and how it becomes windows of tokens.

A text is named by a spec: the standard library's held-out modules, a file, a Hugging Face dataset, or wikitext2.
Not covered: which split a result should be reported on; chat templates; images and audio.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify.corpus import Split, standard_library_text
from sparsify.errors import SparsifyError, UnavailableError, suggest
from sparsify.hold_out import HELD_OUT, REST, split_documents
from sparsify.hub import hub_problem

WIKITEXT2 = "hf:Salesforce/wikitext:wikitext-2-raw-v1:test"
TEXT_FIELDS = ("text", "story", "content")

_STDLIB: dict[str, Split] = {
    "stdlib:calibration": "calibration",
    "stdlib:evaluation": "evaluation",
    "stdlib:training": "training",
    "stdlib:library": "library",
}
_ALLOWED = (
    "'stdlib:calibration', 'stdlib:evaluation', 'stdlib:training', 'stdlib:library', 'wikitext2', "
    "'hf:DATASET[:CONFIG[:SPLIT[:FIELD]]]', "
    "or the path of a UTF-8 text file or of a .jsonl file with a 'text' field"
)


@dataclass(frozen=True)
class Text:
    """Documents and where they came from. The name is a spec or a file's name, never a folder of one machine."""

    name: str
    documents: list[str]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(document.encode()) for document in self.documents)

    @property
    def sha256(self) -> str:
        """SHA-256 of the documents, each preceded by its length, so that where they are cut counts."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and which of their tokens are scored.

    tokens [N, S] int64; scored_from [N] int64: window n scores its positions scored_from[n] .. S−1 (position 0 is
    never scored: nothing predicts it); token_bytes [N, S] int64: the UTF-8 bytes that each token stands for.
    """

    tokens: Tensor
    scored_from: Tensor
    token_bytes: Tensor
    stride: int
    bos: bool
    byte_count: str
    name: str
    sha256: str

    @property
    def seq_len(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def scored(self) -> Tensor:
        """Which tokens are scored, bool [N, S]."""
        return torch.arange(self.seq_len) >= self.scored_from[:, None]

    @property
    def tokens_scored(self) -> int:
        return int(self.scored.sum())

    @property
    def bytes(self) -> int:
        """UTF-8 bytes that the scored tokens stand for."""
        return int(self.token_bytes[self.scored].sum())


def read_text(spec: str) -> Text:
    """Returns the text that a spec names; see the message of the error for the specs there are.

    Raises SparsifyError for an unknown spec, a missing, empty or non-UTF-8 file, or a .jsonl without text, and
    UnavailableError where the hub or the `datasets` package is missing. `SPEC#held-out` is the last quarter of a text,
    `SPEC#rest` what is before it.
    """
    for index, part in enumerate((REST, HELD_OUT)):
        if spec.endswith(part):
            whole = read_text(spec.removesuffix(part))
            return _not_empty(Text(whole.name + part, split_documents(whole.documents)[index]))
    if spec in _STDLIB:
        try:
            return Text(spec, standard_library_text(_STDLIB[spec]))
        except ValueError as error:
            raise UnavailableError(str(error)) from error
    if spec == "wikitext2":
        # The field's custom (GPTQ and after): all lines joined by an empty line, one document.
        return Text(spec, ["\n\n".join(_hub_rows(WIKITEXT2))])
    if spec.startswith("hf:"):
        return _not_empty(Text(spec, [row for row in _hub_rows(spec) if row.strip()]))
    return _read_file(spec)


def default_evaluation_text(model_spec: str) -> tuple[Text, str]:
    """Returns the text to evaluate a model on where none is named, and one sentence that says which and why."""
    if model_spec == "reference":
        return read_text("stdlib:evaluation"), (
            "evaluation text: held-out modules of the standard library (stdlib:evaluation), "
            "which the reference model was not trained on"
        )
    try:
        return read_text("wikitext2"), "evaluation text: WikiText-2 raw, test split (wikitext2)"
    except UnavailableError as error:
        return read_text("stdlib:evaluation"), (
            f"evaluation text: held-out modules of the standard library (stdlib:evaluation), in place of WikiText-2: "
            f"{error}"
        )


def windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    limit: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
) -> Windows:
    """Cuts the text into windows of seq_len tokens and says which tokens are scored.

    The documents' tokens are joined into one stream, nothing between them. Each window begins with BOS where the
    tokenizer adds one by itself (bos=True or False overrules it); BOS takes one of the seq_len positions.
    Windows do not overlap unless stride (in text tokens) is smaller: then each scores its last `stride` tokens, the
    first all. What is left after the last whole window is dropped. limit is the largest number of windows.
    Bytes are exact, from the tokenizer's offsets; a character cut into several tokens counts at its first token, and
    characters that the tokenizer drops count at the next token. A tokenizer without offsets gets each document's
    bytes spread evenly over its tokens (byte_count says "proportional").
    Raises SparsifyError where the text is too short for one window, or on a bad seq_len, stride or limit.
    """
    with_bos = adds_bos(tokenizer) if bos is None else bos
    if with_bos and tokenizer.bos_token_id is None:
        raise SparsifyError("bos=True, but this tokenizer has no BOS token: leave bos out")
    body = seq_len - with_bos
    _check(seq_len, limit, stride)
    step = min(stride or body, body)
    wanted = None if limit is None else body + (limit - 1) * step
    ids, sizes = _stream(text, tokenizer, wanted)
    if len(ids) < body:
        raise SparsifyError(
            f"text {text.name} is too short: {len(ids)} tokens, one window of {seq_len} needs {body}; "
            f"use a longer text or --seq-len {len(ids) + with_bos} or less"
        )
    tokens, token_bytes = ids.unfold(0, body, step)[:limit], sizes.unfold(0, body, step)[:limit]
    if with_bos:
        first = torch.full((len(tokens), 1), int(tokenizer.bos_token_id))
        tokens = torch.cat([first, tokens], dim=1)
        token_bytes = torch.cat([torch.zeros_like(first), token_bytes], dim=1)
    scored_from = torch.full((len(tokens),), max(1, seq_len - step))
    scored_from[0] = 1
    byte_count = "offsets" if tokenizer.is_fast else "proportional"
    return Windows(
        tokens.contiguous(), scored_from, token_bytes.contiguous(), step, with_bos, byte_count, text.name, text.sha256
    )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _check(seq_len: int, limit: int | None, stride: int | None) -> None:
    if seq_len < 2:
        raise SparsifyError(f"seq_len must be at least 2, not {seq_len}: one token to predict from, one to predict")
    if limit is not None and limit < 1:
        raise SparsifyError(f"the number of windows must be at least 1, not {limit}")
    if stride is not None and not 1 <= stride <= seq_len:
        raise SparsifyError(f"stride must be between 1 and seq_len ({seq_len}), not {stride}")


def _stream(text: Text, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> tuple[Tensor, Tensor]:
    """Returns the token ids [T] of all documents and the bytes [T] each stands for; at least `wanted` if given."""
    ids: list[np.ndarray[Any, Any]] = [np.empty(0, np.int64)]
    sizes = ids.copy()
    total = 0
    for document in text.documents:
        if wanted is not None and total >= wanted:
            break
        # verbose=False: the length warning is about the model's context, and these are cut to windows.
        encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        ids.append(np.asarray(encoded["input_ids"], dtype=np.int64))
        sizes.append(_token_bytes(document, len(ids[-1]), encoded.get("offset_mapping")))
        total += len(ids[-1])
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(sizes))


def _token_bytes(document: str, tokens: int, offsets: list[tuple[int, int]] | None) -> np.ndarray[Any, Any]:
    """Returns the bytes of each token [T]; they sum to the document's bytes."""
    if tokens == 0:
        return np.empty(0, np.int64)
    total = len(document.encode())
    if offsets is None:
        covered = np.arange(1, tokens + 1) * total // tokens
    else:
        codepoints = np.frombuffer(document.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (codepoints > 0x7F) + (codepoints > 0x7FF).astype(np.int64) + (codepoints > 0xFFFF)
        before = np.concatenate([[0], np.cumsum(widths)])
        covered = np.maximum.accumulate(before[np.asarray(offsets, dtype=np.int64)[:, 1]])
        covered[-1] = total
    return np.diff(covered, prepend=0)


def _read_file(spec: str) -> Text:
    path = Path(spec).expanduser()
    if path.is_dir():
        raise SparsifyError(f"text {spec!r} is a folder: name one file in it")
    if not path.is_file():
        raise SparsifyError(_missing(spec, path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SparsifyError(f"text file {spec!r} cannot be read: {error.strerror}") from error
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SparsifyError(
            f"text file {spec!r} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; "
            "convert it first, for example with iconv -f LATIN1 -t UTF-8"
        ) from error
    if path.suffix.lower() == ".jsonl":
        return _not_empty(Text(path.name, list(jsonl_documents(spec, content.split("\n")))))
    return _not_empty(Text(path.name, [content] if content.strip() else []))


def _missing(spec: str, path: Path) -> str:
    names = [*_STDLIB, "wikitext2"]
    if path.suffix or "/" in spec:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = suggest(spec, names) or suggest(path.name, siblings)
        return f"text file {spec!r} does not exist.{near} Allowed are {_ALLOWED}"
    return f"unknown text {spec!r}: allowed are {_ALLOWED}.{suggest(spec, names)}"


def jsonl_documents(spec: str, lines: Iterable[str]) -> Iterator[str]:
    """Yields the text of each line; the lines are cut at line feeds alone, as JSON strings may hold U+2028.

    Raises SparsifyError for a line that is no JSON, or has no text.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SparsifyError(f"{spec!r} line {number} is not JSON: {error.msg}") from error
        field = next((f for f in TEXT_FIELDS if isinstance(record, dict) and isinstance(record.get(f), str)), None)
        if field is None:
            found = f"fields {', '.join(map(str, record))}" if isinstance(record, dict) else type(record).__name__
            raise SparsifyError(
                f"{spec!r} line {number} has no text: expected an object with a string in one of "
                f"{', '.join(TEXT_FIELDS)}, found {found}"
            )
        document = record[field]
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise SparsifyError(f"{spec!r} line {number} is not valid Unicode: {error.reason}") from error
        if document.strip():
            yield document


def _not_empty(text: Text) -> Text:
    if not text.documents:
        raise SparsifyError(f"text {text.name} is empty: it holds no characters but spaces; use another one")
    return text


def _hub_rows(spec: str) -> list[str]:
    rows, field = hub_dataset(spec, split="test", streaming=False)
    return [str(row) for row in rows[field]]


def hub_dataset(spec: str, *, split: str, streaming: bool) -> tuple[Any, str]:
    """Returns the dataset that hf:DATASET[:CONFIG[:SPLIT[:FIELD]]] names and its text field; split: where none is.

    Raises SparsifyError for another form, a dataset that cannot be loaded or has no such field, and UnavailableError
    where the hub or the `datasets` package is missing.
    """
    parts = spec.removeprefix("hf:").split(":")
    if len(parts) > 4 or not parts[0]:
        raise SparsifyError(f"{spec!r} is not of the form hf:DATASET[:CONFIG[:SPLIT[:FIELD]]]")
    dataset, config, named, field = parts + [""] * (4 - len(parts))
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError(
            f"{spec!r} needs the datasets package: pip install datasets, or use a text file or stdlib:evaluation"
        ) from error
    if problem := hub_problem():
        raise UnavailableError(
            f"{spec!r} cannot be loaded, the Hugging Face hub is unreachable ({problem}). {_HUB_ADVICE}"
        )
    try:
        rows = datasets.load_dataset(dataset, config or None, split=named or split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        raise SparsifyError(f"{spec!r} cannot be loaded: {error}") from error
    except OSError as error:
        raise UnavailableError(f"{spec!r} cannot be loaded: {error}. {_HUB_ADVICE}") from error
    # A stream may learn its columns from its first row only.
    columns = rows.column_names or list(next(iter(rows), {}))
    fields = [field] if field else [f for f in TEXT_FIELDS if f in columns]
    if not fields or fields[0] not in columns:
        raise SparsifyError(
            f"{spec!r} has no field {field or ' / '.join(TEXT_FIELDS)}: it has {', '.join(columns)}; "
            "name one as hf:DATASET:CONFIG:SPLIT:FIELD"
        )
    return rows, fields[0]


_HUB_ADVICE = (
    "Check the network; with a copy in the cache set HF_HUB_OFFLINE=1; or give a text file or stdlib:evaluation"
)
