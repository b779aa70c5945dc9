"""`sparsify convert --stream` and `--resume` as the user types them: the same files, or one clear line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sparsify.evals import machine
from sparsify.streaming import conversion

Run = Any


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _said(result: Any) -> str:
    return " ".join(result.output.split())


@pytest.fixture
def flags(quick: list[str]) -> list[str]:
    """A quick conversion of a method that streams, with what goes into the card."""
    return [*quick[:-2], "--eval-windows", "3", "--method", "rsparse", "--rho", "0.8"]


def test_the_files_and_the_report_are_those_of_the_plain_command(
    run: Run, dense_model: Path, tmp_path: Path, flags: list[str]
) -> None:
    out = tmp_path / "out"
    plain = run("convert", dense_model, "--out", out, *flags, "--format", "json")
    assert plain.exit_code == 0, plain.output
    out.rename(tmp_path / "plain")
    streamed = run("convert", dense_model, "--out", out, *flags, "--stream", "--format", "json")
    assert streamed.exit_code == 0, streamed.output
    # The card's measured perplexities and realised sparsity are among them.
    assert _files(out) == _files(tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]
    reports = [json.loads(result.stdout) | {"seconds": 0} for result in (plain, streamed)]
    assert reports[0] == reports[1]
    assert run("verify", out).exit_code == 0


def test_stopped_and_resumed(
    run: Run, dense_model: Path, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("convert", dense_model, "--out", tmp_path / "out", *flags)
    assert run(*command, "--stream").exit_code == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    real = conversion.BlockConverter.convert

    def interrupted(self: Any, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(conversion.BlockConverter, "convert", interrupted)
        stopped = run(*command, "--stream")
    assert stopped.exit_code == 130
    assert "interrupted after 1 of 2 blocks: the same command with --resume goes on from there" in _said(stopped)
    refused = run(*command, "--stream")
    assert refused.exit_code == 2
    assert "give --resume to go on with it, or remove it to start anew" in _said(refused)
    mixed = run(*command, "--resume", "--sparsity", "0.6")
    assert mixed.exit_code == 2
    assert "setting sparsity (0.5 then, 0.6 now)" in _said(mixed)
    resumed = run(*command, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "method auto rotates the residual stream of the whole model: use method rsparse, teal"),
        (["--method", "teal", "--rotate"], "--rotate rotates the residual stream"),
        (["--method", "cats"], "method cats is not made for it"),
        (["--method", "relu"], "method relu is not made for it"),
        (["--method", "relufy"], "method relufy changes the whole model"),
        (["--method", "teal", "--allocation", "sensitivity"], "allocation sensitivity needs passes over the whole"),
        (["--method", "teal", "--max-ppl-increase", "1%"], "--max-ppl-increase tries the whole model"),
        (["--method", "teal", "--speedup", "1.5"], "--speedup tries the whole model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_stream_is_named(run: Run, dense_model: Path, tmp_path: Path, flags: list[str], word: str) -> None:
    result = run("convert", dense_model, "--out", tmp_path / "out", "--stream", *flags)
    assert result.exit_code == 2
    assert word in _said(result)
    assert list(tmp_path.iterdir()) == []


def test_experts_are_refused(run: Run, dense_model: Path, tmp_path: Path, quick: list[str]) -> None:
    config = transformers.MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "moe" / name).write_bytes((dense_model / name).read_bytes())
    result = run("convert", tmp_path / "moe", "--out", tmp_path / "out", "--stream", "--method", "teal", *quick)
    assert result.exit_code == 2
    assert "does not convert a MixtralForCausalLM, whose experts transformers merges" in _said(result)


def test_a_model_that_does_not_fit_is_not_loaded(
    run: Run, dense_model: Path, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda device: 100_000)
    command = ("convert", dense_model, "--out", tmp_path / "out", "--method", "teal", *quick)
    result = run(*command)
    assert result.exit_code == 4
    assert "GB of memory to spare: --stream converts one block at a time, with --method rsparse, teal" in _said(result)
    assert run(*command, "--stream").exit_code == 0


# The command, in a process that waits in its first block until Ctrl-C was seen.
_WAITING = """
import signal, sys, time
from sparsify.cli.main import main
from sparsify.streaming.block import BlockConverter

real = BlockConverter.convert

def waiting(self, index):
    print("in a block", file=sys.stderr, flush=True)
    while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        time.sleep(0.01)
    return real(self, index)

BlockConverter.convert = waiting
main()
"""


def test_ctrl_c_in_a_process_of_its_own(dense_model: Path, tmp_path: Path, flags: list[str]) -> None:
    """The whole way: a signal from outside, exit code 130, one line that says how to go on."""
    arguments = ["convert", str(dense_model), "--out", "out", *flags, "--stream"]
    started = subprocess.Popen(
        [sys.executable, "-c", _WAITING, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert started.stderr is not None
    while "in a block" not in (line := started.stderr.readline()):
        assert line, "it ended before its first block"
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=300)
    assert started.returncode == 130, said
    assert "stopping after this block; Ctrl-C again stops at once" in said
    assert said.splitlines()[-1].startswith("error: interrupted after 1 of 2 blocks")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_thread_counts_are_not_mixed(run: Run, dense_model: Path, tmp_path: Path, flags: list[str]) -> None:
    real = conversion.BlockConverter.convert

    def interrupted(self: Any, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, index)

    command = ("convert", dense_model, "--out", tmp_path / "out", *flags)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(conversion.BlockConverter, "convert", interrupted)
        assert run(*command, "--stream").exit_code == 130
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        result = run(*command, "--resume")
    finally:
        torch.set_num_threads(threads)
    assert f"threads ({threads} then, {threads + 1} now)" in _said(result)
