"""`sparsify convert` with a rise of perplexity or a speed in the place of a sparsity, and with a search's state."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparsify

Run = Any


def test_a_rise_of_perplexity(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "o"
    flags = ["--method", "teal", "--max-ppl-increase", "1%", "--held-out", "4", "--out", out]
    result = run("convert", dense_model, *flags, *quick, "--save", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())["budget"]
    assert found["increase"] <= 0.01 == found["max_increase"]
    assert [entry["within"] for entry in found["tries"] if entry["sparsity"] == found["sparsity"]][-1]
    assert "is the sparsest within 1.000%" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["method_config"]["sparsity"] == found["sparsity"]
    assert config["calibration"]["source"] == "text.txt#rest"
    assert "| budget | perplexity at most 1.000% above dense: found " in (out / "README.md").read_text()
    assert sparsify.verify(out) == []
    again = tmp_path / "again"
    assert run("convert", "--config", out / "sparsify.yaml", "--out", again).exit_code == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_speed(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a model this small the real times may make no difference, which is refused.
    monkeypatch.setattr("sparsify.evals.cost_table._scaled", lambda costs, total: costs)
    table = tmp_path / "costs.json"
    flags = ["--method", "teal", "--speedup", "1.0001", "--cost-table", table]
    # What is fast on a model of this size is noise: a table of our own says what is predicted.
    first = run("convert", dense_model, *flags, "--out", tmp_path / "first", *quick)
    assert first.exit_code == 0 or "cannot be had here: the largest" in first.stderr
    costs = json.loads(table.read_text())
    assert [len(shape["points"]) for shape in costs["shapes"]] == [6] * 4
    costs["rest_ms"] = 1.0
    costs["dense_ms"] = {"dense": 10.0, "transformers": 12.0}
    for shape in costs["shapes"]:
        shape["points"] = [[0.0, 0.0], [1.0, 9.0 / 4]]
    table.write_text(json.dumps(costs))
    flags[3] = "2"
    result = run("convert", dense_model, *flags, "--out", tmp_path / "o", *quick, "--save", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())["budget"]
    # 10 / (1 + 9 (1 − s)) = 2 at s = 5/9.
    assert found["sparsity"] == pytest.approx(5 / 9, abs=0.001)
    assert found["predicted"] == pytest.approx(2.0, abs=0.01)
    assert found["measured"]["p10"] <= found["measured"]["median"] <= found["measured"]["p90"]
    assert "predicted" in result.stdout
    assert "measured" in result.stdout
    assert "| budget | 2 times as fast as the best dense way: found 55.6%" in (tmp_path / "o/README.md").read_text()
    flags[3] = "20"
    refused = run("convert", dense_model, *flags, "--out", tmp_path / "no", *quick)
    assert refused.exit_code == 2
    assert "cannot be had here: the largest that is predicted is 6.90, at sparsity 95%" in refused.stderr
    costs["machine"]["cpu"] = "Another"
    table.write_text(json.dumps(costs))
    refused = run("convert", dense_model, *flags, "--out", tmp_path / "no", *quick)
    assert refused.exit_code == 2
    assert "measured on another machine: cpu 'Another'" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_an_evolutionary_search_is_written_down(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    state = tmp_path / "state.json"
    flags = ["--method", "teal", "--allocation", "evolutionary", "--allocation-state", state, "--seed", "3"]
    result = run("convert", dense_model, *flags, "--out", tmp_path / "o", *quick)
    assert result.exit_code == 0, result.output
    assert "allocation evolutionary" in result.stdout
    held = json.loads(state.read_text())
    assert len(held["history"]) == 6
    assert held["fingerprint"]["seed"] == 3
    again = run("convert", dense_model, *flags, "--out", tmp_path / "again", *quick)
    assert again.exit_code == 0
    assert "allocate: " not in again.stderr
    assert (tmp_path / "o/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    other = run("convert", dense_model, *flags, "--sparsity", "0.4", "--out", tmp_path / "other", *quick)
    assert other.exit_code == 2
    assert "state of another search: method.sparsity differ" in other.stderr


def test_a_budget_among_the_flags_takes_the_place_of_the_files(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"model": str(dense_model), "method": "teal", "max_ppl_increase": "1%"}))
    result = run("convert", "--config", file, "--sparsity", "0.3", "--out", tmp_path / "o", *quick)
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((tmp_path / "o" / "sparsify.yaml").read_text())
    assert (written["sparsity"], written["max_ppl_increase"]) == (0.3, None)


def test_without_a_budget_it_is_half_the_bytes(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    assert run("convert", dense_model, "--method", "teal", "--out", tmp_path / "o", *quick).exit_code == 0
    assert yaml.safe_load((tmp_path / "o" / "sparsify.yaml").read_text())["sparsity"] == 0.5


@pytest.mark.parametrize(("method", "sparsity"), [("relufy", None), ("relufy+teal", 0.5), ("teal", 0.5)])
def test_the_settings_written_are_those_settled(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str], method: str, sparsity: float | None
) -> None:
    out, again = tmp_path / "o", tmp_path / "again"
    assert run("convert", dense_model, "--method", method, "--out", out, *quick).exit_code == 0
    written = yaml.safe_load((out / "sparsify.yaml").read_text())
    assert (written["method"], written["sparsity"]) == (method, sparsity)
    assert run("convert", "--config", out / "sparsify.yaml", "--out", again).exit_code == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert yaml.safe_load((again / "sparsify.yaml").read_text()) == written | {"out": str(again)}
