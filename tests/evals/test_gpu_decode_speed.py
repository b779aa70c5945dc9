"""Cells of a decode measurement: their order, the time, what cannot run; on a CPU, whose native step takes the part."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from sparsify.evals import gpu_decode_speed as module
from sparsify.evals.gpu_decode_speed import CELLS, decode_cells, main, table
from sparsify.evals.shapes import SHAPES
from sparsify.runtime import switch_of

pytestmark = pytest.mark.usefixtures("small_stream")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    monkeypatch.setitem(SHAPES, "tiny", (LlamaConfig, values))


def _cells(**settings: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "seconds": 600.0,
        "device": "cpu",
        "new_tokens": 4,
        "rounds": 1,
        "sparsities": (0.5, 0.9),
    }
    return decode_cells("tiny", **defaults | settings)


def test_every_cell_has_every_sparsity_and_the_first_one_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = module.decode_speed

    def spied(model: Any, tokens: torch.Tensor, **settings: Any) -> Any:
        seen.append((tokens.shape, settings["prompt_tokens"], switch_of(model).prefill))
        return real(model, tokens, **settings)

    monkeypatch.setattr(module, "decode_speed", spied)
    documents: list[int] = []
    found = _cells(cells=((16, 1), (40, 2)), partial=lambda document: documents.append(len(document["cells"])))
    assert seen == [((1, 24), 16, "dense"), ((2, 48), 40, "dense")]
    assert documents == [1, 2]
    first, second = found["cells"]
    assert (first["context"], first["batch"]) == (16, 1)
    assert list(first["sides"])[:2] == ["sparse-50", "sparse-90"]
    assert "transformers" in first["sides"]
    assert "transformers" not in second["sides"]
    assert second["sides"]["sparse-50"]["touched"]["realised_sparsity"] == pytest.approx(0.5, abs=0.1)
    text = table(found)
    assert "| 40 | 2 | sparse-90 |" in text
    assert text.count("(best dense)") == 2
    json.dumps(found)


def test_cells_that_fail_or_have_no_time_are_said() -> None:
    found = _cells(cells=((400, 1), (16, 1)))
    assert [cell["context"] for cell in found["cells"]] == [16]
    assert found["not_run"][0]["context"] == 400
    assert "256 positions" in found["not_run"][0]["reason"]
    none = _cells(seconds=-1.0, cells=((16, 1), (16, 2)))
    assert none["cells"] == []
    assert [cell["reason"] for cell in none["not_run"]] == ["no time was left"] * 2
    assert "Not run: context 16, batch 2: no time was left." in table(none)


def test_a_side_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_DIFFERENCE", -1.0)
    found = _cells(cells=((16, 1),))
    (cell,) = found["cells"]
    assert list(cell["sides"]) == ["transformers"]
    assert "its logits differ by" in cell["left_out"]["sparse-50"]
    assert "not timed: its logits differ" in table(found)


def test_the_command_writes_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(decode_cells.__kwdefaults__, "cells", ((16, 1),))  # type: ignore[arg-type]
    file = tmp_path / "out.json"
    arguments = ["--shape", "tiny", "--device", "cpu", "--new-tokens", "3", "--rounds", "1", "--save", str(file)]
    assert main(arguments) == 0
    assert len(json.loads(file.read_text())["cells"]) == 1
    assert "tiny, random weights, cpu" in capsys.readouterr().out
    assert main(["--shape", "tynu", "--device", "cpu"]) == 2
    assert "unknown shape 'tynu'" in capsys.readouterr().err


def test_all_that_was_asked_for_is_planned() -> None:
    assert sorted(CELLS) == sorted((context, batch) for context in (128, 1024, 4096) for batch in (1, 2, 4, 8))
    assert CELLS[0] == (128, 1)
