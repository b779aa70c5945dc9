"""`sparsify inspect` of a checkpoint and of a dense model, and `sparsify verify` of whole and broken checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

Run = Any


def test_a_checkpoint_is_shown_whole(run: Run, checkpoint: Path) -> None:
    data = json.loads(run("inspect", checkpoint, "--format", "json").stdout)
    assert (data["method"], data["converted"], len(data["linears"])) == ("rsparse", True, 14)
    assert data["ledger"]["linears"] == 14
    for linear in data["linears"]:
        assert linear["threshold"] > 0
        assert linear["touched_bytes"] <= 0.51 * linear["dense_bytes"]
    result = run("inspect", checkpoint)
    assert "Linears of model.layers" in result.stdout
    assert "0.self_attn.q_proj " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_dense_model_shows_what_would_be_converted(run: Run, dense_model: Path) -> None:
    data = json.loads(run("inspect", dense_model, "--format", "json").stdout)
    assert (data["converted"], data["linears"], data["sites"]) == (False, 14, 8)
    result = run("inspect", dense_model)
    assert "mlp.gate_proj" in result.stdout
    assert "sparsify convert" in result.stdout


def test_a_checkpoint_shows_its_key_numbers(run: Run, checkpoint: Path) -> None:
    data = json.loads(run("inspect", checkpoint, "--format", "json").stdout)
    errors = [linear["error"] for linear in data["linears"]]
    assert (data["allocation"], data["rotated"], len(data["checkpoint_sha256"])) == ("uniform", False, 64)
    words = " ".join(run("inspect", checkpoint).stdout.split())
    assert f"mean {100 * sum(errors) / len(errors):.1f}%, worst {100 * max(errors):.1f}%" in words
    assert "Low rank in 14 of 14 linears" in words
    assert f"sparsify report {checkpoint}" in words


def test_a_dense_model_says_how_sparse_it_could_be(run: Run, dense_model: Path) -> None:
    found = json.loads(run("inspect", dense_model, "--format", "json").stdout)["estimate"]
    assert [kind["linear"] for kind in found["kinds"]][-2:] == ["mlp.down_proj", "all"]
    for kind in found["kinds"]:
        assert 0.0 < kind["sparsity"]["0.01"] < kind["sparsity"]["0.05"] <= 0.9
    result = run("inspect", dense_model)
    assert "an estimate by output error" in result.stdout
    assert f"sparsify measure {dense_model}" in result.stdout
    assert "--max-ppl-increase" in result.stdout
    assert "[out, in]" in result.stdout
    assert "estimate" not in run("inspect", dense_model, "--no-estimate").stdout


def test_without_a_tokenizer_the_estimate_says_why(run: Run, dense_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(dense_model, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "No estimate" in result.stdout
    assert "tokenizer" in result.stdout
    assert "mlp.gate_proj" in result.stdout


def test_activations_are_those_of_a_checkpoint(run: Run, checkpoint: Path, dense_model: Path, text_file: Path) -> None:
    data = json.loads(run("inspect", checkpoint, "--activations", text_file, "--format", "json").stdout)
    assert len(data["activations"]) == 14
    assert (
        data["checkpoint_sha256"]
        == json.loads(run("inspect", checkpoint, "--format", "json").stdout)["checkpoint_sha256"]
    )
    result = run("inspect", dense_model, "--activations", text_file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "converted checkpoint" in result.stderr


def test_a_sound_checkpoint_is_verified(run: Run, checkpoint: Path) -> None:
    result = run("verify", checkpoint)
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(run("verify", checkpoint, "--format", "json").stdout)["sound"] is True


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "sparsify_ledger.json"])
def test_a_changed_file_is_named(run: Run, checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    result = run("verify", folder)
    assert result.exit_code in (1, 3), result.output
    assert name in result.output
    assert "Traceback" not in result.output


def test_missing_and_extra_files_are_named(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").unlink()
    (folder / "extra.bin").write_text("x")
    result = run("verify", folder, "--format", "json")
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["problems"]
    assert any("README.md" in problem for problem in problems)
    assert any("extra.bin" in problem for problem in problems)


def test_what_is_no_checkpoint_is_refused(run: Run, dense_model: Path, tmp_path: Path) -> None:
    for folder in (dense_model, tmp_path, tmp_path / "none"):
        result = run("verify", folder)
        assert (result.exit_code, result.stdout) == (3, "")
        assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("command", ["eval", "generate", "bench", "inspect"])
def test_a_truncated_checkpoint_is_refused(
    run: Run, checkpoint: Path, tmp_path: Path, text_file: Path, command: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    needed = {"generate": ["--prompt", "a"], "eval": ["--text", text_file]}.get(command, [])
    result = run(command, folder, *needed)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.splitlines()[-1].startswith("error: ")
