"""A random bf16 Llama of three blocks, calibration text, and what the conversion in memory makes of both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparsify
from sparsify.evals.realised import RealisedDensity
from sparsify.streaming.conversion import Streamed, convert_streamed

VOCABULARY = 64
BATCHES = (torch.arange(32).reshape(2, 16), torch.arange(16).flip(0).reshape(1, 16))


@dataclass(frozen=True)
class Setting:
    """A dense model's folder, the method, and the calibration text of one conversion."""

    model: Path
    method: Any
    calibration: sparsify.Calibration

    def stream(self, out: Path, **options: Any) -> Streamed:
        """Converts block by block."""
        return convert_streamed(str(self.model), out, self.method, self.calibration, **options)

    def in_memory(self, out: Path, allocation: str | None = None) -> Path:
        """Converts as a whole."""
        model = sparsify.load_dense(str(self.model))
        sparsify.convert(model, self.method, self.calibration, allocation=allocation)
        return sparsify.save(model, out)


@dataclass(frozen=True)
class MeanLogit:
    """An evaluation whose numbers depend on every bit of the logits."""

    def batches(self, model: PreTrainedModel) -> Sequence[Tensor]:
        return BATCHES

    def densities(self, model: PreTrainedModel, run: Callable[[], None]) -> dict[str, float]:
        with RealisedDensity(model) as counted:
            run()
        return counted.densities()

    def measure(self, model: PreTrainedModel, densities: Mapping[str, float]) -> dict[str, Any] | None:
        def mean() -> float:
            with torch.inference_mode():
                logits = [model(input_ids=batch, use_cache=False).logits.double() for batch in BATCHES]
            return float(torch.cat([x.flatten() for x in logits]).mean())

        with sparsify.dense(model):
            dense = mean()
        return {"dense": dense, "sparse": mean(), "densities": dict(densities)}

    def rows(self, measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {name: {"mean logit": repr(measured[name])} for name in ("dense", "sparse")}


def random_llama(folder: Path, *, blocks: int = 3, width: int = 32, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Saves a random Llama whose outputs depend on its weights, and returns the folder."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 3 // 2, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def random_tokens(windows: int = 3, length: int = 16) -> sparsify.Calibration:
    tokens = torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(1))
    return sparsify.Calibration(tokens, "random tokens")


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """TEAL at 50% on the random Llama; to be read only."""
    folder = random_llama(tmp_path_factory.mktemp("dense") / "tiny")
    return Setting(folder, sparsify.Teal(sparsity=0.5), random_tokens())


@pytest.fixture(scope="session")
def expected(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that the conversion in memory writes."""
    return contents(setting.in_memory(tmp_path_factory.mktemp("expected") / "out"))
