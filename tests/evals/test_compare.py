"""The comparison: cells, resuming after a kill, refused budgets, and the table."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify.allocation import get_allocation
from sparsify.errors import SparsifyError
from sparsify.evals import compare
from sparsify.evals.compare import Settings, Subject, main, parse_allocation, parse_method, read_cells, run
from sparsify.evals.comparison_table import log_rise, ratio_to_teal, render
from sparsify.methods.rsparse import RSparse

_SETTINGS = Settings(seq_len=16, limit=3, sequences=2)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A tiny random Llama with a tokenizer of single bytes, and two texts."""
    folder = tmp_path_factory.mktemp("compare")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    for name, words in (("train.txt", "one two three four "), ("valid.txt", "five six seven ")):
        (folder / name).write_text(words * 20)
    return Subject(*(str(folder / name) for name in ("tiny", "train.txt", "valid.txt")))


def _run(subject: Subject, out: Path, **options: Any) -> list[dict[str, Any]]:
    options = {"methods": ["teal", "wina"], "sparsities": [0.5], "settings": _SETTINGS} | options
    return run([subject], out=out, **options)


def test_labels_become_methods() -> None:
    assert parse_method("rsparse:rho=0.9,score=magnitude", 0.4) == RSparse(0.4, rho=0.9, score="magnitude")
    assert parse_method("rsparse:rho=auto", 0.4) == RSparse(0.4)
    assert parse_method("rsparse:rho=0.9@greedy", 0.4) == RSparse(0.4, rho=0.9)
    assert parse_allocation("teal") is None
    assert parse_allocation("teal@greedy") == get_allocation("greedy")
    with pytest.raises(SparsifyError, match="unknown allocation 'greed'"):
        parse_allocation("teal@greed")
    with pytest.raises(SparsifyError, match="Did you mean 'teal'"):
        parse_method("teel", 0.5)
    with pytest.raises(SparsifyError, match="takes no option 'rho'"):
        parse_method("teal:rho=1", 0.5)
    with pytest.raises(SparsifyError, match="not of the form"):
        parse_method("rsparse:rho", 0.5)


def test_a_rotated_model_is_another_group(subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    plain = _run(subject, out, methods=["teal"])
    both = _run(subject, out, methods=["teal"], settings=dataclasses.replace(_SETTINGS, rotate=True))
    assert both[:2] == plain
    assert [cell["key"].get("rotated") for cell in both] == [None, None, True, True]
    dense, rotated = (cell["result"]["quality"]["perplexity"] for cell in (both[0], both[2]))
    assert rotated == pytest.approx(dense, rel=1e-3)
    assert both[1]["result"]["quality"]["perplexity"] != both[3]["result"]["quality"]["perplexity"]
    assert "tiny, rotated, every-token" in render(both)


def test_cells_hold_what_was_measured_and_no_folder(subject: Subject, tmp_path: Path) -> None:
    cells = _run(subject, tmp_path / "r.json", protocols=["every-token", "decode"])
    assert [(c["key"]["method"], c["key"]["protocol"]) for c in cells] == [
        (method, protocol) for method in ("dense", "teal", "wina") for protocol in ("every-token", "decode")
    ]
    teal = cells[2]["result"]
    assert teal["nominal_sparsity"] == 0.5
    assert teal["weighted_sparsity"] == pytest.approx(0.5, abs=0.02)
    assert 0.2 < teal["realised_sparsity"] < 0.8
    assert teal["quality"]["tokens"] == 45
    assert log_rise(cells[0], cells[::2]) == 0.0
    assert ratio_to_teal(cells[2], cells[::2]) in (1.0, None)
    written = (tmp_path / "r.json").read_text()
    assert str(Path(subject.model).parent) not in written
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_rsparse_at_rho_1_is_wina(subject: Subject, tmp_path: Path) -> None:
    cells = _run(subject, tmp_path / "r.json", methods=["wina", "rsparse:rho=1.0"])
    qualities = [cell["result"]["quality"] for cell in cells]
    assert qualities[1] == qualities[2] != qualities[0]


def test_a_killed_run_goes_on_where_it_was(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "r.json"
    converted: list[str] = []
    real = compare.convert

    def convert(model: Any, method: Any, calibration: Any, *, allocation: Any) -> Any:
        converted.append(method.name)
        if converted == ["teal", "wina"]:
            raise KeyboardInterrupt
        return real(model, method, calibration, allocation=allocation)

    monkeypatch.setattr(compare, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        _run(subject, out)
    assert [c["key"]["method"] for c in read_cells(out)] == ["dense", "teal"]
    assert [c["key"]["method"] for c in _run(subject, out)] == ["dense", "teal", "wina"]
    assert converted == ["teal", "wina", "wina"]
    before = out.read_bytes()
    _run(subject, out)
    assert out.read_bytes() == before
    # Other windows are other cells.
    assert len(_run(subject, out, settings=Settings(seq_len=16, limit=2, sequences=2))) == 6


def test_a_budget_that_cannot_be_met_is_a_cell(subject: Subject, tmp_path: Path) -> None:
    cells = _run(subject, tmp_path / "r.json", methods=["teal", "rsparse:rho=0.999"])
    assert "too small for a rank" in cells[2]["refused"]
    assert "refused: the budget is too small" in render(cells)
    assert log_rise(cells[2], cells) is None


def test_the_table_states_protocol_texts_and_ratios(subject: Subject, tmp_path: Path) -> None:
    out, table = tmp_path / "r.json", tmp_path / "docs" / "r.md"
    code = main(
        ["--model", subject.model, subject.calibration, subject.evaluation, "--out", str(out), "--markdown", str(table),
         "--methods", "teal", "rsparse:rho=0.5", "--sparsities", "0.25", "0.5", "--seq-len", "16", "--limit", "3",
         "--sequences", "2"]
    )  # fmt: skip
    assert code == 0
    text = table.read_text(encoding="utf-8")
    assert "## tiny, every-token" in text
    assert "of valid.txt in 3 windows of 16 tokens, no BOS" in text
    assert "| method | 25% | 50% |" in text
    assert "| gate_proj | 48×32 |" in text
    cells = read_cells(out)
    teal, ours = (next(c for c in cells if c["key"]["method"] == m) for m in ("teal", "rsparse:rho=0.5"))
    ratio = ratio_to_teal(ours, cells)
    base, own = log_rise(teal, cells), log_rise(ours, cells)
    assert base is not None
    assert own is not None
    assert ratio == (own / base if base > 0 else None)


def test_bad_input_is_one_error(subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "r.json"
    assert main(["--model", "nothing", "a", "b", "--out", str(out), "--seq-len", "16"]) == 2
    assert "unknown model 'nothing'" in caplog.text
    assert not out.exists()
    for content in ("{", "[]", json.dumps({"schema_version": 99, "cells": []})):
        out.write_text(content)
        with pytest.raises(SparsifyError, match="name another file"):
            _run(subject, out)
        assert out.read_text() == content
