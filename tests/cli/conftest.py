"""A tiny random Llama with a tokenizer of its own, a text, and checkpoints converted from it by the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from sparsify.cli.main import build_app

Run = Callable[..., Any]
WORDS = "def mean(values):\n    return sum(values) / len(values)\n\nclass Line:\n    pass\n\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"# {i}\n{WORDS}" for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers, fp32."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def app() -> typer.Typer:
    """The command line as installed."""
    return build_app()


@pytest.fixture
def run(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in this process: run("eval", "x") has exit_code, stdout, stderr, and data for JSON."""
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments: str | Path) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def quick(text_file: Path) -> list[str]:
    """The flags that make a conversion of the tiny model quick."""
    return ["--calibration", str(text_file), "--sequences", "4", "--seq-len", "32", "--eval-windows", "0"]


@pytest.fixture(scope="session")
def checkpoint(app: typer.Typer, dense_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model converted with R-Sparse at 50% and some low rank; to be read only."""
    out = tmp_path_factory.mktemp("converted") / "tiny-50"
    flags = f"--method rsparse --rho 0.8 --calibration {text_file} --sequences 4 --seq-len 32 --eval-windows 2".split()
    result = CliRunner().invoke(app, ["convert", str(dense_model), "--out", str(out), *flags, "--format", "json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["out"] == str(out)
    return out
