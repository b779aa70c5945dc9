"""`sparsify convert --method relufy` as the user types it, what it writes, and `sparsify inspect --neurons`."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import sparsify
from sparsify.relu_layer import FatRelu
from sparsify.runtime import sparse_layers

Run = Any


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_a_fitted_relu_model_is_an_ordinary_checkpoint(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str]
) -> None:
    fit = ["--reconstruct", "2", "--reconstruct-zeros", "0.05", "--reconstruct-state", tmp_path / "state"]
    out = tmp_path / "relu"
    result = run("convert", dense_model, "--method", "relufy", "--plain", *fit, "--out", out, *quick)
    assert result.exit_code == 0, result.output
    assert "relu in the place of SiLUActivation in 2 MLPs, each MLP fitted in 2 passes" in " ".join(
        result.stdout.split()
    )
    assert max(map(len, result.stdout.splitlines())) <= 80
    config = _config(out)
    assert (config["hidden_act"], config["architectures"]) == ("relu", ["LlamaForCausalLM"])
    assert "quantization_config" not in config
    assert "nothing but transformers" in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not sparse_layers(model)
    assert type(model.get_submodule("model.layers.0.mlp.act_fn")) is torch.nn.ReLU
    # Its zeros then save weights.
    again = run("convert", out, "--method", "relu", "--out", tmp_path / "sparse", "--format", "json", *quick)
    data = json.loads(again.stdout)
    assert 0.05 < data["ledger"]["weighted_sparsity"] < 0.5


def test_the_swap_ends_in_sparse_layers(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "o"
    flags = ["--method", "relufy+teal", "--sparsity", "0.4", "--cett", "0.1"]
    result = run("convert", dense_model, *flags, "--out", out, "--format", "json", *quick)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["method"], data["method_config"]["cett"]) == ("relu+teal", 0.1)
    assert data["relufied"]["activation"] == "relu"
    assert yaml.safe_load((out / "sparsify.yaml").read_text())["method"] == "relufy+teal"
    assert "ReLU-fication" in (out / "README.md").read_text()
    assert sparsify.verify(out) == []
    layers = sparse_layers(sparsify.load(out))
    assert float(layers["model.layers.0.mlp.up_proj"].threshold) > 0.0
    assert float(layers["model.layers.0.self_attn.q_proj"].threshold) > 0.0


def test_fatrelu_is_written_as_vllm_reads_it(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "fat"
    flags = ["--method", "relufy", "--activation", "fatrelu", "--plain"]
    result = run("convert", dense_model, *flags, "--out", out, "--format", "json", *quick)
    assert result.exit_code == 0, result.output
    cuts = {numbers["cut"] for numbers in json.loads(result.stdout)["relufied"]["numbers"].values()}
    config = _config(out)
    assert (config["hidden_act"], {config["hidden_act_param"]}) == ("fatrelu", cuts)
    assert config["architectures"] == ["MiniCPMForCausalLM"]
    # vLLM's MiniCPM: embedding · scale_emb, residual · scale_depth/√layers, before the head / (hidden/dim_model_base).
    assert config["scale_emb"] == 1.0
    assert config["scale_depth"] / config["num_hidden_layers"] ** 0.5 == 1.0
    assert config["hidden_size"] / config["dim_model_base"] == 1.0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is LlamaForCausalLM
    assert {model.get_submodule(f"model.layers.{i}.mlp.act_fn").cut for i in range(2)} == cuts


def test_fatrelu_in_sparse_layers_is_the_cut_of_relu(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str]
) -> None:
    out = tmp_path / "fat"
    flags = ["--method", "relufy", "--activation", "fatrelu", "--cut", "0.05"]
    assert run("convert", dense_model, *flags, "--out", out, *quick).exit_code == 0
    assert _config(out)["hidden_act"] == "relu"
    assert "hidden_act_param" not in _config(out)
    model = sparsify.load(out)
    assert isinstance(model.get_submodule("model.layers.0.mlp.act_fn"), FatRelu)
    assert float(sparse_layers(model)["model.layers.0.mlp.up_proj"].threshold) == pytest.approx(0.05)


def test_a_killed_fit_goes_on_to_the_same_checkpoint(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str]
) -> None:
    flags = ["convert", str(dense_model), "--method", "relufy", "--plain", "--reconstruct", "100", *quick]
    state = ["--reconstruct-state", str(tmp_path / "state")]
    command = [sys.executable, "-m", "sparsify.cli.main", *flags, *state, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "state" / "mlp-000.json").is_file():
        assert process.poll() is None, "it ended before its first MLP"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed").exists()
    first = (tmp_path / "state" / "mlp-000.safetensors").stat().st_mtime_ns
    assert run(*flags, *state, "--out", tmp_path / "on").exit_code == 0
    assert (tmp_path / "state" / "mlp-000.safetensors").stat().st_mtime_ns == first
    assert run(*flags, "--out", tmp_path / "whole").exit_code == 0
    weights = "model.safetensors"
    assert (tmp_path / "on" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_stage_2_of_drelu_is_one_sparse_checkpoint(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str]
) -> None:
    out = tmp_path / "o"
    flags = ["--method", "relufy", "--activation", "drelu", "--after-norms"]
    result = run("convert", dense_model, *flags, "--out", out, "--format", "json", *quick)
    assert result.exit_code == 0, result.output
    assert _config(out)["hidden_act"] == "drelu_after_norms"
    linears = {
        linear["name"]: linear for linear in json.loads(run("inspect", out, "--format", "json").stdout)["linears"]
    }
    assert linears["model.layers.0.self_attn.q_proj"]["density"] < 0.7
    assert linears["model.layers.0.mlp.down_proj"]["density"] < linears["model.layers.0.mlp.up_proj"]["density"]
    assert sparsify.verify(out) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "teal", "--reconstruct", "3"], "--reconstruct is for method relufy, and the method is teal"),
        (["--method", "teal", "--after-norms"], "--after-norms is for method relufy"),
        (["--reconstruct-inputs", "dense"], "--reconstruct-inputs is for --reconstruct, the number of passes"),
        (["--activation", "rellu"], "unknown activation 'rellu'"),
        (["--activation", "polyrelu"], "activation polyrelu has no sparse layers, only relu, relu2, fatrelu"),
        (["--plain", "--cut", "0.1"], "--plain writes no sparse layers: leave --cut"),
        (["--max-ppl-increase", "1%"], "relufy with --plain first, then convert the result with this budget"),
        (["--zeros", "0.9"], "zeros is for activation shifted_relu, not for relu"),
        (["--cut", "0.1", "--cett", "0.1"], "cut 0.1 and cett 0.1 both say where a ReLU is cut"),
    ],
    ids=["fit", "norms", "no-fit", "activation", "dense", "plain", "budget", "zeros", "cuts"],
)
def test_bad_flags_are_one_error(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str], flags: list[str], said: str
) -> None:
    method = [] if "--method" in flags else ["--method", "relufy"]
    result = run("convert", dense_model, *method, *flags, "--out", tmp_path / "o", *quick)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "o").exists()


def test_a_model_without_a_counterpart_is_refused_before_any_work(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str]
) -> None:
    tanh = tmp_path / "tanh"
    model = sparsify.load_dense(str(dense_model))
    model.config.hidden_act = "tanh"
    model.save_pretrained(tanh)
    sparsify.load_tokenizer(str(dense_model)).save_pretrained(tanh)
    result = run("convert", tanh, "--method", "relufy", "--out", tmp_path / "o", *quick)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Tanh, which has no ReLU counterpart" in " ".join(result.stderr.split())
    assert run("convert", tanh, "--method", "relufy", "--dry-run", *quick).exit_code == 2


@pytest.mark.parametrize(
    "flags",
    [["--activation", "drelu", "--after-norms"], ["--activation", "fatrelu"], ["--activation", "polynorm", "--plain"]],
    ids=["drelu", "fatrelu", "dense"],
)
def test_a_dry_run_plans_it_without_weights(run: Run, dense_model: Path, quick: list[str], flags: list[str]) -> None:
    result = run("convert", dense_model, "--method", "relufy", *flags, "--dry-run", "--format", "json", *quick)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dry_run"] is True


def test_inspect_counts_neurons(run: Run, dense_model: Path, text_file: Path, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "o"
    assert run("convert", dense_model, "--method", "relufy", "--out", out, *quick).exit_code == 0
    data = json.loads(run("inspect", out, "--neurons", text_file, "--format", "json").stdout)
    assert [mlp["mlp"] for mlp in data["mlps"]] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert data["neurons"] == 256
    assert 0.3 < data["mean_zeros"] < 0.7
    result = run("inspect", out, "--neurons", text_file)
    assert result.exit_code == 0, result.output
    assert "zeros (AP)" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    dense = json.loads(run("inspect", dense_model, "--neurons", text_file, "--format", "json").stdout)
    assert dense["mean_zeros"] < 0.01
    both = run("inspect", out, "--neurons", text_file, "--activations", text_file)
    assert (both.exit_code, both.stdout) == (2, "")
