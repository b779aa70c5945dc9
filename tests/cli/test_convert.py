"""`sparsify convert` from flags, from YAML, and the checkpoint that it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparsify
from sparsify.cli.settings import ConvertSettings

Run = Any


def test_a_checkpoint_holds_its_settings_and_its_numbers(checkpoint: Path, dense_model: Path) -> None:
    settings = ConvertSettings.from_yaml(checkpoint / "sparsify.yaml")
    assert (settings.model, settings.rho, settings.seq_len) == (str(dense_model), 0.8, 32)
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert "| sparse | " in card
    assert "stdlib:evaluation" in card
    assert sparsify.verify(checkpoint) == []


def test_the_settings_of_a_checkpoint_repeat_it(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    result = run("convert", "--config", checkpoint / "sparsify.yaml", "--out", out)
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "config.json", "sparsify_ledger.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()


def test_flags_win_over_the_file(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"model": str(dense_model), "method": "teal", "sparsity": 0.25, "prefill": "dense"}))
    result = run("convert", "--config", file, "--out", tmp_path / "o", "--sparsity", "0.5", "--format", "json", *quick)
    data = json.loads(result.stdout)
    assert (data["method"], data["method_config"], data["prefill"]) == ("teal", {"sparsity": 0.5}, "dense")
    assert data["ledger"]["weighted_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert yaml.safe_load((tmp_path / "o" / "sparsify.yaml").read_text())["sparsity"] == 0.5


@pytest.mark.parametrize("method", ["rsparse", "teal", "wina", "larosa"])
def test_human_output_says_what_was_made(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str], method: str
) -> None:
    result = run("convert", dense_model, "--method", method, "--out", tmp_path / "o", *quick)
    assert result.exit_code == 0, result.output
    assert "14 converted linears" in result.stdout
    assert f"{method} at 50.0%" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "calibrate: 4/4, done in" in result.stderr


def test_rotation_and_compensation_are_flags(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    flags = ["--method", "teal", "--rotate", "--compensate"]
    assert run("convert", dense_model, "--out", tmp_path / "o", *flags, *quick).exit_code == 0
    section = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert section["rotated"] is True
    assert section["method_config"] == {"sparsity": 0.5, "compensate": True}
    larosa = ["--method", "larosa", "--rotation", "layer", "--sparsity", "0.25"]
    assert run("convert", dense_model, "--out", tmp_path / "l", *larosa, *quick).exit_code == 0
    section = json.loads((tmp_path / "l" / "config.json").read_text())["quantization_config"]
    assert "rotated" not in section
    assert section["method_config"]["rotation"] == "layer"
    refused = run("convert", dense_model, "--out", tmp_path / "t", "--method", "teal", "--rotation", "layer", *quick)
    assert refused.exit_code == 2
    assert "larosa does" in " ".join(refused.output.split())


def test_dry_run_shows_the_plan_and_writes_nothing(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str]
) -> None:
    result = run("convert", dense_model, "--out", tmp_path / "o", "--dry-run", "--format", "json", *quick)
    data = json.loads(result.stdout)
    assert (data["linears"], data["sites"], data["dry_run"]) == (14, 8, True)
    assert data["kinds"][0] == {
        "linear": "model.layers.*.self_attn.q_proj", "outputs": 64, "inputs": 64, "count": 2,
        "shares_input_with": ["model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj"],
    }  # fmt: skip
    assert not (tmp_path / "o").exists()
    assert "nothing was written" in run("convert", dense_model, "--dry-run", *quick).stdout


def test_a_recipe_is_followed(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"model.layers.0.self_attn.q_proj": {"sparsity": 0.25, "rho": 0.5}}))
    result = run("convert", dense_model, "--out", tmp_path / "o", "--method", "rsparse", "--recipe", recipe, *quick)
    assert result.exit_code == 0, result.output
    entries = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]["linears"]
    assert entries["model.layers.0.self_attn.q_proj"]["rho"] == 0.5
    assert entries["model.layers.1.self_attn.q_proj"]["sparsity"] == 0.5


def test_a_method_that_chooses_per_prompt(
    run: Run, dense_model: Path, text_file: Path, tmp_path: Path, quick: list[str]
) -> None:
    out = tmp_path / "griffin"
    flags = ["convert", dense_model, "--method", "griffin", "--sparsity", "0.3", *quick]
    result = run(*flags, "--eval-windows", "1", "--out", out, "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["prefill"] == "dense"
    assert data["measured"]["sparse"]["protocol"] == "decode"
    refused = run(*flags, "--prefill", "sparse", "--out", tmp_path / "other")
    assert refused.exit_code == 2
    assert "method griffin chooses neurons by a prompt that runs dense" in " ".join(refused.stderr.split())
    refused = run("eval", out, "--text", text_file, "--seq-len", "16", "--limit", "1")
    assert refused.exit_code == 2
    assert "use --protocol decode" in " ".join(refused.stderr.split())
    assert run("eval", out, "--text", text_file, "--seq-len", "16", "--protocol", "decode").exit_code == 0
    assert "prompt-top-k in 2 MLPs" in run("inspect", out).stdout


def test_a_budget_beyond_the_mlps_is_refused_before_any_work(run: Run, dense_model: Path, quick: list[str]) -> None:
    result = run("convert", dense_model, "--method", "cats", "--sparsity", "0.9", "--dry-run", *quick)
    assert result.exit_code == 2
    assert "sparsity 0.9 cannot be met by method cats" in " ".join(result.stderr.split())
