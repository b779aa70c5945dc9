"""Training windows: every token of the text once an epoch, BOS first, EOS between, the same for the same seed."""

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from sparsify.errors import SparsifyError
from sparsify.models import load_tokenizer
from sparsify.training.packing import PackedText, Source
from sparsify.training.source import open_source

DOCUMENTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(100)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("reference")


def _windows(documents: list[str], tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[list[int]]:
    data = PackedText(Source("test", documents), tokenizer, context=32, seed=seed)
    return [item["input_ids"].tolist() for item in islice(iter(data), count)]


def test_an_epoch_has_every_document_once_between_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Windows are of the size of a document here, so that they can be put back into their order."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = [[*tokenizer(d, add_special_tokens=False)["input_ids"], eos] for d in DOCUMENTS]
    count = sum(map(len, documents)) // 31
    found = _windows(DOCUMENTS, tokenizer, count)
    assert all(len(window) == 32 and window[0] == bos for window in found)
    # Of all documents but the last, which the end of the last whole window cuts, every token is there.
    tokens = Counter(token for window in found for token in window[1:])
    whole = Counter(token for document in documents for token in document)
    assert not tokens - whole
    assert sum((whole - tokens).values()) < 31
    assert tokens[eos] >= len(DOCUMENTS) - 3


def test_windows_of_one_document_are_spread_over_the_epoch(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = ["alpha " * 600, "omega " * 600]
    found = _windows(documents, tokenizer, 60)
    kinds = [window[5] for window in found]
    changes = sum(a != b for a, b in pairwise(kinds))
    assert changes > 15, "neighbours are of one document"


def test_windows_depend_on_the_seed_and_epochs_differ(tokenizer: PreTrainedTokenizerBase) -> None:
    first = _windows(DOCUMENTS, tokenizer, 120)
    assert _windows(DOCUMENTS, tokenizer, 120) == first
    assert _windows(DOCUMENTS, tokenizer, 120, seed=1) != first
    size = sum(len(tokenizer(d, add_special_tokens=False)["input_ids"]) + 1 for d in DOCUMENTS)
    epoch = size // 31
    assert len(first) > 2 * epoch > 0
    assert first[:epoch] != first[epoch : 2 * epoch]


def test_labels_are_the_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    item = next(iter(PackedText(Source("test", DOCUMENTS), tokenizer, context=16, seed=0)))
    assert set(item) == {"input_ids", "labels"}
    assert item["labels"].tolist() == item["input_ids"].tolist()


def test_a_short_text_fills_windows_from_several_epochs_or_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(_windows(["a b c d e f g h i j k l m n o p q r s t u v w x y z"] * 2, tokenizer, 3)) == 3
    with pytest.raises(SparsifyError, match="test is too short: it does not fill one window of 32"):
        _windows(["x"], tokenizer, 1)


def test_files_are_streamed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.training.source._PIECE", 10)
    path = tmp_path / "a.txt"
    path.write_text("12345\n12345\nend\n", encoding="utf-8")
    source = open_source(str(path))
    assert source.name == "a.txt"
    for _ in range(2):
        assert list(source.documents) == ["12345\n12345\n", "end\n"]
    lines = tmp_path / "b.jsonl"
    lines.write_text('{"text": "one"}\n\n{"story": "two\\u2028three"}\n', encoding="utf-8")
    assert list(open_source(str(lines)).documents) == ["one", "two\u2028three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n ", "a.txt is empty"),
        ("a.txt", b"\xff\xfe", "is not UTF-8: byte 0xff"),
        ("a.jsonl", b"not json\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"words": 1}\n', "line 1 has no text"),
    ],
)
def test_text_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SparsifyError, match=message):
        open_source(str(tmp_path / name))


def test_splits_of_the_standard_library_and_unknown_names() -> None:
    assert any("def " in document for document in open_source("stdlib:library").documents)
    with pytest.raises(SparsifyError, match="Did you mean 'stdlib:library'"):
        open_source("stdlib:libary")


def test_datasets_are_streamed_from_their_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "one"}, {"text": " "}, {"text": "two"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("sparsify.text.hub_problem", lambda: None)
    source = open_source("hf:who/what")
    assert asked == [("who/what", None, "train", True)]
    for _ in range(2):
        assert list(source.documents) == ["one", "two"]
