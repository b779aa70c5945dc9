"""`sparsify finetune`: the whole command, what it writes, a run that is killed, and input that it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsify.cli.finetune_view import FinetuneView

Run = Callable[..., Any]


@pytest.fixture
def flags(text_file: Path) -> list[str]:
    """The flags that make a finetuning of the tiny model quick, but for its steps."""
    return [
        "--text", str(text_file), "--evaluation", str(text_file), "--calibration", str(text_file), "--context", "64",
        "--batch", "2", "--eval-windows", "2", "--learning-rate", "0.01", "--precision", "fp32", "--device", "cpu",
    ]  # fmt: skip


def test_command_writes_a_relu_checkpoint_with_its_card_and_a_sparse_one(
    run: Run, dense_model: Path, flags: list[str], tmp_path: Path
) -> None:
    out, sparse = tmp_path / "out", tmp_path / "sparse"
    stages = ["--stages", "2:0,4:0.5,6:1.0", "--shift", "auto"]
    result = run("finetune", dense_model, *flags, *stages, "--out", out, "--sparse-out", sparse, "--format", "json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["steps"], report["tokens"], report["stages"]["factors"]) == (6, 768, [0.0, 0.5, 1.0])
    natural, shifted = report["measured"]["shifts"]
    assert natural["shift"] == 0.0
    assert natural["perplexity"] == pytest.approx(report["measured"]["after"]["perplexity"], rel=1e-6)
    assert shifted["mean"] > natural["mean"] > 0.2
    search = report["measured"]["shift_search"]
    assert report["shift"] == shifted["shift"] in [point["shift"] for point in search]
    # Stock transformers runs it, and it is a ReLU model.
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.hidden_act == "relu"
    assert model.config.use_cache
    assert {path.name for path in out.iterdir()} >= {"README.md", "training.png", "training.json", "finetune.yaml"}
    card = (out / "README.md").read_text()
    assert "![loss and sparsity over the tokens](training.png)" in card
    assert f"{shifted['perplexity']:.3f}" in card
    assert f"{natural['perplexity']:.3f}" in card
    assert "0 at 2, 0.5 at 4, 1 at 6; reduction mean" in card
    assert (out / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    history = json.loads((out / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history if "lambda" in entry] == [1, 2, 3, 4, 5, 6]
    # The ledger knows what its zeros save: down's columns are read for what is above the cut.
    inspected = run("inspect", sparse, "--format", "json")
    assert inspected.exit_code == 0, inspected.output
    evaluated = run("eval", sparse, "--text", flags[1], "--seq-len", "64", "--limit", "2", "--format", "json")
    assert evaluated.exit_code == 0, evaluated.output
    (found,) = json.loads(evaluated.stdout)["models"]
    densities = found["realised_densities"]
    downs = [share for name, share in densities.items() if name.endswith("down_proj")]
    assert 1.0 - sum(downs) / len(downs) == pytest.approx(shifted["mean"], abs=0.01)
    assert found["sparse"]["perplexity"] == pytest.approx(shifted["perplexity"], rel=1e-3)
    # The settings beside it are a configuration of the same run.
    again = run("finetune", "--config", out / "finetune.yaml", "--out", tmp_path / "again", "--sparse-out",
                tmp_path / "s2", "--state", tmp_path / "again.state")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_to_the_same_bytes(run: Run, dense_model: Path, flags: list[str], tmp_path: Path) -> None:
    steps = ["--stages", "20:0,50:0.5,100:1.0", "--checkpoint-every", "20"]
    arguments = ["finetune", str(dense_model), *flags, *steps]
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "sparsify.cli.main", *arguments, "--out", str(killed)]
    # As many threads as here: sums of other parts are rounded otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    checkpoint = tmp_path / "killed.state" / "checkpoint-20" / "trainer_state.json"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not killed.exists()
    assert not (tmp_path / "killed.state" / "trained").exists()
    again = run(*arguments, "--out", killed, "--format", "json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["resumed_from"] >= 20
    assert run(*arguments, "--out", tmp_path / "whole").exit_code == 0
    assert (killed / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    one, other = (json.loads((folder / "training.json").read_text()) for folder in (killed, tmp_path / "whole"))
    assert [entry.get("loss") for entry in one["history"]] == [entry.get("loss") for entry in other["history"]]


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(
    run: Run, dense_model: Path, flags: list[str], tmp_path: Path
) -> None:
    config = tmp_path / "gloo.yaml"
    config.write_text("trainer: {ddp_backend: gloo}\n")
    arguments = ["finetune", str(dense_model), *flags, "--stages", "2:0,4:1.0", "--learning-rate", "0.001"]
    two, one = tmp_path / "two", tmp_path / "one"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "sparsify.cli.main", *arguments, "--config", str(config), "--out", str(two), "--format", "json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # One result, from the main process.
    assert json.loads(done.stdout)["tokens"] == 4 * 2 * 2 * 64
    assert run(*arguments, "--batch", "4", "--out", one).exit_code == 0
    logs = [json.loads((folder / "training.json").read_text())["history"] for folder in (two, one)]
    for name in ("lm_loss", "regulariser", "sparsity", "lambda", "loss"):
        values = [[entry[name] for entry in log if name in entry] for log in logs]
        assert len(values[0]) == 4
        assert values[0] == pytest.approx(values[1], rel=1e-3), name


def test_log_lines_say_what_the_training_does(run: Run, dense_model: Path, flags: list[str], tmp_path: Path) -> None:
    result = run(
        "finetune", dense_model, *flags, "--method", "dense", "--steps", "4", "--log-every", "2", "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "step 4/4: loss" in result.stderr
    assert "tokens/s, about 0.0 s left" in result.stderr
    assert "baseline of a finetuning" in (tmp_path / "out" / "README.md").read_text()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_act == "silu"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--stages", "10:0,5:0.1"], "one ends at step 5, after one that ends at step 10"),
        (["--stages", "10=0"], "is not of the form STEP:FACTOR"),
        (["--method", "prosparce"], "unknown method 'prosparce'.*Did you mean 'prosparse'"),
        (["--recipe", "prosparse-70b"], "unknown recipe 'prosparse-70b'.*Did you mean"),
        (["--tokens", "lots"], "tokens is 'lots': give a number, such as"),
        (["--tokens", "100"], "100 tokens are less than one step of 128"),
        (["--tokens", "1k"], "6 stages do not fit into 7 steps"),
        (["--tokens", "1M", "--steps", "5"], "tokens and steps are both given"),
        (["--shift", "-1"], "shift is -1.0: it must be a finite number of at least 0, or auto"),
        (["--shift", "some"], "shift is 'some'"),
        (["--teacher", "reference"], "a teacher is for distillation"),
        (["--context", "512", "--steps", "20"], "512 tokens are more than this model's 256 positions"),
        (["--text", "nowhere.txt"], "text file 'nowhere.txt' does not exist"),
        (["--method", "dense", "--sparse-out", "s"], "method dense keeps the activation"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    run: Run, dense_model: Path, flags: list[str], tmp_path: Path, given: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = run("finetune", dense_model, *flags, *given, "--out", "out")
    assert result.exit_code == 2, result.output
    assert re.search(message, " ".join(result.stderr.split())), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_relu_counterpart_is_refused(
    run: Run, dense_model: Path, flags: list[str], tmp_path: Path
) -> None:
    folder = _copy(dense_model, tmp_path / "tanh")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "tanh"}))
    result = run("finetune", folder, *flags, "--steps", "20", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "has no ReLU counterpart" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["tanh"]


def test_a_loss_that_is_not_a_number_stops_with_what_to_do(
    run: Run, dense_model: Path, flags: list[str], tmp_path: Path
) -> None:
    folder = _copy(dense_model, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = run("finetune", folder, *flags, "--method", "relu", "--steps", "4", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert "the loss is nan at step 1, with factor 0: nothing was updated, no checkpoint was written" in said
    assert not (tmp_path / "out").exists()


def test_recipes_are_settings_that_hold(run: Run) -> None:
    from sparsify.training.settings import FinetuneSettings, read_recipe, recipe_names

    assert recipe_names() == ["budget", "prosparse-13b", "prosparse-7b", "reference"]
    for name in recipe_names():
        settings = FinetuneSettings().updated(read_recipe(name), source=name)
        assert settings.about
        assert settings.schedule(1).factors[-1] > 0.0
        assert yaml.safe_load(yaml.safe_dump(settings.trainer)) == settings.trainer
    paper = FinetuneSettings().updated(read_recipe("prosparse-13b"), source="recipe").schedule(1)
    assert paper.ends == (5500, 6750, 10750, 11000, 15000, 16000)
    assert paper.factors == (0.0, 5e-3, 1e-2, 1e-2, 2e-2, 2e-2)
    budget = FinetuneSettings().updated(read_recipe("budget") | {"tokens": "1G", "peak": 0.4}, source="recipe")
    assert budget.schedule(8).steps == 10**9 // (2048 * 8 * 8)
    assert budget.schedule(8).factors[-1] == pytest.approx(0.4)


def test_the_live_table_shows_layers_and_the_time_left() -> None:
    from io import StringIO

    from sparsify.training.trainer import Moment

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    sparsity = {f"model.layers.{i}.mlp.down_proj": 0.5 + 0.1 * i for i in range(3)}
    with FinetuneView(screen) as view:
        view.see(Moment(3, 10, 2.5, 2.0, 5.0, 0.1, None, 1e-3, sparsity, 12288, 4096.0, 65.0))
    shown = screen.getvalue()
    for part in ("step 3/10", "1 min 05 s", "4,096 a second", "loss 2.0000", "L1 5 × λ 0.1 = 0.5", "60.0%", "70.0%"):
        assert part in shown, part


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to
