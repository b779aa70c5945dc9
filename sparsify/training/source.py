"""Training text by the same specs as everywhere (sparsify.text), read as a stream: nothing larger than a piece is held.

Not covered: where a text is short, all of it is read at once (the standard library's splits, wikitext2).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from sparsify.errors import SparsifyError
from sparsify.text import hub_dataset, jsonl_documents, read_text
from sparsify.training.packing import Source

# Characters of a text file that are one document: tokenizers hold a document and its tokens at once.
_PIECE = 1 << 20


def open_source(spec: str) -> Source:
    """Returns the documents that a spec names: as sparsify.text.read_text, and hf:... has the split "train" by default.

    A text file is cut into documents of about a million characters at the ends of lines. Raises SparsifyError and
    UnavailableError as read_text does; for what only a later part of a large file holds, when it is read.
    """
    path = Path(spec).expanduser()
    documents: Iterable[str]
    if spec.startswith("hf:"):
        documents = _HubDocuments(spec)
    elif path.is_file():
        documents = _FileDocuments(spec, path)
    else:
        documents = read_text(spec).documents
    if next(iter(documents), None) is None:
        raise SparsifyError(f"training text {spec} is empty: it holds no characters but spaces; use another one")
    return Source(path.name if path.is_file() else spec, documents)


class _HubDocuments:
    """The text field of a dataset's rows, streamed."""

    def __init__(self, spec: str) -> None:
        self._rows, self._field = hub_dataset(spec, split="train", streaming=True)

    def __iter__(self) -> Iterator[str]:
        return (text for row in self._rows if (text := str(row[self._field])).strip())


class _FileDocuments:
    """The documents of a .jsonl file, or the pieces of any other."""

    def __init__(self, spec: str, path: Path) -> None:
        self._spec, self._path = spec, path

    def __iter__(self) -> Iterator[str]:
        try:
            with self._path.open(encoding="utf-8", newline="\n") as lines:
                yield from jsonl_documents(self._spec, lines) if self._path.suffix.lower() == ".jsonl" else _cut(lines)
        except UnicodeDecodeError as error:
            raise SparsifyError(
                f"text file {self._spec!r} is not UTF-8: byte {error.object[error.start]:#04x}; convert it first, for "
                "example with iconv -f LATIN1 -t UTF-8"
            ) from error
        except OSError as error:
            raise SparsifyError(f"text file {self._spec!r} cannot be read: {error.strerror}") from error


def _cut(lines: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if "".join(piece).strip():
        yield "".join(piece)
