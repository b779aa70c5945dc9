"""The comparison: cells, resuming after a kill, refused budgets, and the table."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify.allocation import get_allocation
from sparsify.errors import SparsifyError
from sparsify.evals import compare_cell
from sparsify.evals.compare import Settings, Subject, parse_allocation, parse_method, read_cells, run
from sparsify.evals.compare_labels import split_labels
from sparsify.evals.comparison_summary import Section, sections
from sparsify.evals.comparison_table import render
from sparsify.evals.generation_check import GenerationSettings
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


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("teal,wina", ["teal", "wina"]),
        ("rsparse:rho=0.9,score=magnitude@greedy,teal", ["rsparse:rho=0.9,score=magnitude@greedy", "teal"]),
        ("rsparse:rho=0.9, rsparse:rho=1,teal@greedy,", ["rsparse:rho=0.9", "rsparse:rho=1", "teal@greedy"]),
    ],
)
def test_lists_of_labels(text: str, labels: list[str]) -> None:
    assert split_labels(text) == labels


def test_cells_hold_what_was_measured_and_no_folder(subject: Subject, tmp_path: Path) -> None:
    cells = _run(subject, tmp_path / "r.json", protocols=["every-token", "decode"])
    assert [(c["key"]["method"], c["key"]["protocol"]) for c in cells] == [
        (method, protocol) for method in ("dense", "teal", "wina") for protocol in ("every-token", "decode")
    ]
    for cell in cells[:2]:
        assert (cell["key"]["seed"], cell["key"]["calibration"]) == (None, None)
        assert (cell["result"]["divergence"]["kl"], cell["result"]["divergence"]["top1_agreement"]) == (0.0, 1.0)
    teal = cells[2]["result"]
    assert teal["nominal_sparsity"] == 0.5
    assert teal["weighted_sparsity"] == pytest.approx(0.5, abs=0.02)
    assert 0.2 < teal["realised_sparsity"] < 0.8
    assert teal["quality"]["tokens"] == teal["divergence"]["tokens"] == 45
    assert teal["divergence"]["kl"] > 0
    drifts = {e["name"]: e["realised_density"] - e["density"] for e in teal["linears"]}
    assert teal["drift"]["mean"] == pytest.approx(sum(drifts.values()) / len(drifts))
    worst = teal["drift"]["worst"]
    assert abs(worst["drift"]) == max(map(abs, drifts.values())) == abs(drifts[worst["linear"]])
    section, decode = sections(cells)
    assert (section.log_rise(cells[0]), decode.dense) == (0.0, cells[1])
    assert section.ratio_to_teal("teal", 0.5) in (1.0, None)
    written = (tmp_path / "r.json").read_text()
    assert str(Path(subject.model).parent) not in written
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_rsparse_at_rho_1_is_wina(subject: Subject, tmp_path: Path) -> None:
    cells = _run(subject, tmp_path / "r.json", methods=["wina", "rsparse:rho=1.0"])
    qualities = [cell["result"]["quality"] for cell in cells]
    assert qualities[1] == qualities[2] != qualities[0]


def test_seeds_change_the_calibration_and_nothing_else(subject: Subject, tmp_path: Path) -> None:
    cells = _run(subject, tmp_path / "r.json", methods=["teal"], seeds=3)
    keys = [cell["key"] for cell in cells]
    assert [key["seed"] for key in keys] == [None, 0, 1, 2]
    assert len({key["calibration"]["sha256"] for key in keys[1:]}) == 3
    for name in ("text_sha256", "windows", "model_sha256"):
        assert len({key[name] for key in keys}) == 1
    assert len({cell["result"]["quality"]["nll_per_token"] for cell in cells[1:]}) == 3
    (section,) = sections(cells)
    spread = section.spread("teal", 0.5, lambda cell: cell["result"]["divergence"]["kl"])
    values = torch.tensor([cell["result"]["divergence"]["kl"] for cell in cells[1:]], dtype=torch.float64)
    assert spread is not None
    assert (spread.mean, spread.std, spread.seeds) == (pytest.approx(values.mean()), pytest.approx(values.std()), 3)
    # One seed more is one cell more.
    more = _run(subject, tmp_path / "r.json", methods=["teal"], seeds=4)
    assert more[:4] == cells
    assert len(more) == 5


def test_a_killed_run_goes_on_where_it_was(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "r.json"
    converted: list[str] = []
    real = compare_cell.convert

    def convert(model: Any, method: Any, calibration: Any, **options: Any) -> Any:
        converted.append(method.name)
        if converted == ["teal", "wina"]:
            raise KeyboardInterrupt
        return real(model, method, calibration, **options)

    monkeypatch.setattr(compare_cell, "convert", convert)
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


def test_a_protocol_without_meaning_is_a_cell(subject: Subject, tmp_path: Path) -> None:
    options = {"methods": ["griffin"], "sparsities": [0.3]}
    cells = _run(subject, tmp_path / "r.json", protocols=["every-token", "decode"], **options)
    assert ["refused" in cell for cell in cells] == [False, False, True, False]
    assert "use --protocol decode" in cells[2]["refused"]
    with pytest.raises(SparsifyError, match="unknown protocol 'decoded'"):
        _run(subject, tmp_path / "other.json", protocols=["decoded"], **options)


def test_a_generation_check_is_added_to_cells_that_are_there(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.json"
    before = _run(subject, out, methods=["teal"], protocols=["every-token", "decode"])
    monkeypatch.setattr(compare_cell, "perplexity", lambda *args, **options: pytest.fail("measured again"))
    settings = Settings(seq_len=16, limit=3, sequences=2, generation=GenerationSettings(prompts=2, new_tokens=8))
    options: dict[str, Any] = {"methods": ["teal"], "protocols": ["every-token", "decode"], "settings": settings}
    cells = _run(subject, out, **options)
    assert [cell["result"] for cell in cells] == [cell["result"] for cell in before]
    dense, teal = cells[0]["generation"], cells[2]["generation"]
    assert (dense["agreement"], dense["never_parted"]) == (8.0, 2)
    assert teal["agreement"] < 8
    assert dense["dense"] == teal["dense"] == {name: dense[name] for name in ("perplexity", "repetition")}
    assert cells[3]["generation"] == teal
    content = out.read_bytes()
    _run(subject, out, **options)
    assert out.read_bytes() == content
    table = render(cells)
    assert "continuations of 2 prompts" in table
    assert "Repeated 4-grams:" in table


def test_what_a_method_or_a_protocol_refuses_is_a_cell(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compare_cell.perplexity

    def perplexity(model: Any, windows: Any, *, protocol: str, **options: Any) -> Any:
        if protocol == "decode" and model.config.to_dict().get("quantization_config"):
            raise SparsifyError("not in this protocol")
        return real(model, windows, protocol=protocol, **options)

    monkeypatch.setattr(compare_cell, "perplexity", perplexity)
    cells = _run(
        subject, tmp_path / "r.json", methods=["teal", "rsparse:rho=0.999"], protocols=["every-token", "decode"]
    )
    assert [("refused" in cell) for cell in cells] == [False, False, False, True, True, True]
    assert "too small for a rank" in cells[4]["refused"]
    table = render(cells)
    assert "| rsparse:rho=0.999 | refused [1] |" in table
    assert "- [1] refused: the budget is too small" in table
    assert "- [1] refused: not in this protocol" in table


def test_what_the_dense_model_refuses_ends_the_run(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="more than this model's 32 positions"):
        _run(subject, tmp_path / "r.json", settings=Settings(seq_len=33, limit=2, sequences=2))
    check = GenerationSettings(prompts=2, new_tokens=17)
    with pytest.raises(SparsifyError, match="33 tokens are more than this model's 32"):
        _run(subject, tmp_path / "r.json", settings=Settings(seq_len=16, limit=2, sequences=2, generation=check))
    assert not (tmp_path / "r.json").exists()


def test_the_table_means_marks_and_counts_seeds(make_cell: Callable[..., dict[str, Any]]) -> None:
    cells = [
        make_cell("dense", 0.0, 1.0, seed=None),
        make_cell("teal", 0.5, 1.1), make_cell("teal", 0.5, 1.3, seed=1), make_cell("teal", 0.7, 2.0),
        make_cell("wina", 0.5, 1.1), make_cell("wina", 0.5, 1.1, seed=1),
        make_cell("wina", 0.7, 0.0, refused="no room"),
    ]  # fmt: skip
    table = render(cells)
    low, high = math.exp(1.1), math.exp(1.3)
    mean, std = (low + high) / 2, (high - low) / 2**0.5
    assert f"| teal | {mean:.3f} ± {std:.3f} (1.00) | 7.389, 1 of 2 seeds (1.00) |" in table
    assert f"| wina | **{low:.3f} ± 0.000 (0.50)** | refused [1] |" in table
    assert "| teal | 50% | 50.0% | 50.0% | +1.0 | -11.0 q1 |" in table
    assert table.endswith("- [1] refused: no room\n")
    # Without TEAL there is nothing to be relative to.
    alone = render([cell for cell in cells if cell["key"]["method"] != "teal"])
    assert f"| wina | {low:.3f} ± 0.000 | refused [1] |" in alone
    assert "TEAL" not in alone


def test_other_calibrations_are_other_sections(subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    _run(subject, out, methods=["teal"])
    cells = _run(subject, out, methods=["teal"], settings=Settings(seq_len=16, limit=3, sequences=3))
    # The dense model takes no calibration: it is not measured again.
    assert [cell["key"]["method"] for cell in cells] == ["dense", "teal", "teal"]
    found: list[Section] = sections(cells)
    assert [section.key["calibration"]["sequences"] for section in found] == [2, 3]
    assert all(section.dense == cells[0] for section in found)


def test_a_line_a_cell_says_what_remains(subject: Subject, tmp_path: Path) -> None:
    lines: list[str] = []
    _run(subject, tmp_path / "r.json", methods=["teal"], note=lines.append)
    assert [line.partition(":")[0] for line in lines] == [
        "1/2 tiny, dense, every-token", "2/2 tiny, teal 50%, seed 0, every-token",
    ]  # fmt: skip
    assert lines[1].endswith("about 0 s left")


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"schema_version": 1, "cells": []})])
def test_another_file_is_refused_and_left_alone(subject: Subject, tmp_path: Path, content: str) -> None:
    out = tmp_path / "r.json"
    out.write_text(content)
    with pytest.raises(SparsifyError, match="name another file"):
        _run(subject, out)
    assert out.read_text() == content
