"""Text specs, their errors, and windows: which tokens are scored and how many bytes they stand for."""

import json
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.text import Text, _token_bytes, default_evaluation_text, read_text, windows

_SENTENCE = "Lily saw a small bird, très jolie, 日本 🙂, in the big tree.\n"


def _tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; its stated context is short, so that warnings about length would show."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_SENTENCE] * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=8)


@pytest.fixture(params=[True, False], ids=["bos", "no-bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return _tokenizer(bos=request.param)


def _datasets(monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[str]] | Exception) -> list[tuple[Any, ...]]:
    """Puts a stand-in for the datasets package in place; returns the list of its calls."""

    class Rows(dict[str, list[str]]):
        @property
        def column_names(self) -> list[str]:
            return list(self)

    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Rows:
        assert not streaming
        calls.append((name, config, split))
        if isinstance(rows, Exception):
            raise rows
        return Rows(rows)

    class DatasetNotFoundError(FileNotFoundError):
        pass

    package = types.ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    package.exceptions = types.SimpleNamespace(DatasetNotFoundError=DatasetNotFoundError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return calls


def test_files_are_read_whole_and_named_without_their_folder(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(_SENTENCE.encode() + b"\r\nend")
    text = read_text(str(file))
    assert text == Text("notes.txt", [_SENTENCE + "\r\nend"])
    assert text.bytes == file.stat().st_size


def test_jsonl_takes_the_first_text_field_and_skips_empty_documents(tmp_path: Path) -> None:
    file = tmp_path / "stories.jsonl"
    # U+2028 ends a line for str.splitlines, not for JSON lines.
    rows = [{"text": "one\u2028two"}, {"story": "b", "n": 1}, {"content": "c"}, {"text": "  "}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert read_text(str(file)).documents == ["one\u2028two", "b", "c"]


def test_sha256_is_of_content_and_of_where_documents_are_cut() -> None:
    assert Text("a", ["ab", "c"]).sha256 == Text("b", ["ab", "c"]).sha256
    assert Text("a", ["ab", "c"]).sha256 != Text("a", ["a", "bc"]).sha256


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_standard_library_text(split: str) -> None:
    text = read_text(f"stdlib:{split}")
    assert text.name == f"stdlib:{split}"
    assert text.bytes > 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8: byte 0xe9 at offset 3"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("fields.jsonl", b'{"body": "a"}', "line 1 has no text: .* found fields body"),
        ("number.jsonl", b'{"text": 3}', "line 1 has no text"),
        ("list.jsonl", b'["a"]', "found list"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}', "line 1 is not valid Unicode"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(SparsifyError, match=message):
        read_text(str(file))


def test_missing_files_and_unknown_specs_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("a")
    with pytest.raises(SparsifyError, match=r"does not exist\. Did you mean 'valid\.txt'"):
        read_text(str(tmp_path / "vald.txt"))
    with pytest.raises(SparsifyError, match=r"unknown text 'wikitext'.*Did you mean 'wikitext2'"):
        read_text("wikitext")
    with pytest.raises(SparsifyError, match="Did you mean 'stdlib:evaluation'"):
        read_text("stdlib:eval")
    with pytest.raises(SparsifyError, match="is a folder"):
        read_text(str(tmp_path))


def test_wikitext2_is_one_document_joined_by_empty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _datasets(monkeypatch, {"text": ["", " = Title = \n", " Words . \n"]})
    assert read_text("wikitext2").documents == ["\n\n = Title = \n\n\n Words . \n"]
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]


def test_hub_datasets_give_a_document_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _datasets(monkeypatch, {"id": ["1", "2"], "body": ["a", " "]})
    assert read_text("hf:who/what:main:train:body") == Text("hf:who/what:main:train:body", ["a"])
    assert calls == [("who/what", "main", "train")]
    with pytest.raises(SparsifyError, match="has no field text / story / content: it has id, body"):
        read_text("hf:who/what")
    with pytest.raises(SparsifyError, match="has no field nothing"):
        read_text("hf:who/what:main:train:nothing")
    with pytest.raises(SparsifyError, match="not of the form"):
        read_text("hf:a:b:c:d:e")


def test_no_datasets_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnavailableError, match="pip install datasets"):
        read_text("hf:who/what")


def test_a_hub_that_fails_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    _datasets(monkeypatch, ConnectionError("Couldn't reach the Hub"))
    with pytest.raises(UnavailableError, match="set HF_HUB_OFFLINE=1"):
        read_text("wikitext2")


def test_a_hub_that_does_not_answer_is_found_before_datasets_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _datasets(monkeypatch, {"text": ["a"]})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UnavailableError, match=r"unreachable .*Name or service not known"):
        read_text("wikitext2")
    assert calls == []


def test_default_text_says_which_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    text, statement = default_evaluation_text("reference")
    assert text.name == "stdlib:evaluation"
    assert "held-out" in statement
    _datasets(monkeypatch, {"text": ["a"]})
    assert default_evaluation_text("gpt2")[0].name == "wikitext2"
    _datasets(monkeypatch, ConnectionError("no network"))
    text, statement = default_evaluation_text("gpt2")
    assert text.name == "stdlib:evaluation"
    assert "in place of WikiText-2" in statement


def test_windows_are_the_stream_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("t", [_SENTENCE * 3, _SENTENCE])
    cut = windows(text, tokenizer, seq_len=16)
    stream = [i for d in text.documents for i in tokenizer(d, add_special_tokens=False)["input_ids"]]
    body = cut.tokens[:, 1:] if cut.bos else cut.tokens
    assert cut.bos == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert cut.tokens.dtype == torch.int64
    assert cut.tokens.shape[1] == cut.seq_len == 16
    assert body.flatten().tolist() == stream[: body.numel()]
    assert len(stream) - body.numel() < body.shape[1]
    if cut.bos:
        assert (cut.tokens[:, 0] == tokenizer.bos_token_id).all()
        assert cut.tokens_scored == body.numel()
    else:
        # Nothing predicts the first token of a window.
        assert cut.tokens_scored == 15 * len(body)


def test_bytes_are_those_of_the_scored_text() -> None:
    tokenizer = _tokenizer(bos=True)
    cut = windows(Text("t", [_SENTENCE * 8]), tokenizer, seq_len=12)
    decoded = tokenizer.decode(cut.tokens[:, 1:].flatten().tolist())
    # A cut inside a character gives its bytes to the token that begins it; here the end may be such a cut.
    assert abs(cut.bytes - len(decoded.rstrip("\ufffd").encode())) <= 3
    assert cut.byte_count == "offsets"


def test_all_tokens_together_stand_for_all_bytes() -> None:
    tokenizer = _tokenizer(bos=False)
    ids = tokenizer(_SENTENCE, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    sizes = _token_bytes(_SENTENCE, len(ids["input_ids"]), ids["offset_mapping"])
    assert sizes.sum() == len(_SENTENCE.encode())
    assert sizes.min() >= 0
    spread = _token_bytes(_SENTENCE, 7, None)
    assert spread.sum() == len(_SENTENCE.encode())
    assert spread.max() - spread.min() <= 1


def test_characters_that_a_tokenizer_drops_still_count() -> None:
    # "  ab" tokenised as a, b: the spaces go to a; what is dropped at the end to b.
    assert _token_bytes("  ab é", 2, [(2, 3), (3, 4)]).tolist() == [3, 4]


@pytest.mark.parametrize("stride", [1, 5, 11, 15, 16])
def test_strided_windows_score_every_token_once(tokenizer: PreTrainedTokenizerFast, stride: int) -> None:
    text = Text("t", [_SENTENCE * 3])
    cut = windows(text, tokenizer, seq_len=16, stride=stride)
    stream = tokenizer(text.documents[0], add_special_tokens=False)["input_ids"]
    scored = cut.tokens[cut.scored].tolist()
    if cut.bos or stride < 16:
        # Without BOS the very first token has nothing that predicts it.
        assert scored == stream[0 if cut.bos else 1 :][: len(scored)]
        assert len(stream) - len(scored) <= stride + 1
    if stride < 15:
        assert (cut.scored[1:].sum(1) == stride).all()
        assert cut.scored[0].sum() == 15


def test_limit_gives_the_first_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text("t", [_SENTENCE] * 9)
    every = windows(text, tokenizer, seq_len=16, stride=7)
    first = windows(text, tokenizer, seq_len=16, stride=7, limit=3)
    assert torch.equal(first.tokens, every.tokens[:3])
    assert torch.equal(first.token_bytes, every.token_bytes[:3])
    assert first.sha256 == every.sha256


def test_bos_can_be_overruled() -> None:
    text = Text("t", [_SENTENCE * 3])
    assert windows(text, _tokenizer(bos=False), seq_len=16, bos=True).tokens[0, 0] == 0
    assert windows(text, _tokenizer(bos=True), seq_len=16, bos=False).tokens[0, 0] != 0


def test_no_warning_about_length(capfd: pytest.CaptureFixture[str]) -> None:
    windows(Text("t", [_SENTENCE * 3]), _tokenizer(bos=True), seq_len=16)
    assert "longer than" not in capfd.readouterr().err


def test_text_that_is_too_short_says_how_many_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    count = len(tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"])
    with pytest.raises(SparsifyError, match=rf"{count} tokens, one window of 512 needs .*--seq-len") as error:
        windows(Text("t", [_SENTENCE]), tokenizer, seq_len=512)
    longest = int(str(error.value).split("--seq-len ")[1].split()[0])
    assert len(windows(Text("t", [_SENTENCE]), tokenizer, seq_len=longest).tokens) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"seq_len": 8, "limit": 0}, "number of windows must be at least 1"),
        ({"seq_len": 8, "stride": 0}, "stride must be between 1 and seq_len"),
        ({"seq_len": 8, "stride": 9}, "stride must be between 1 and seq_len"),
    ],
)
def test_bad_window_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        windows(Text("t", [_SENTENCE]), _tokenizer(bos=True), **settings)  # type: ignore[arg-type]
