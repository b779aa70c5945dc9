"""A tiny model with a tokenizer of bytes, a text, and a finetuning of it that takes a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from sparsify.models import load_dense, load_tokenizer
from sparsify.training.finetune import Finetuned, finetune
from sparsify.training.packing import Source
from sparsify.training.settings import FinetuneSettings

Train = Callable[..., Finetuned]
QUICK: dict[str, Any] = {
    "stage_ends": [2, 4, 6], "factors": [0.0, 0.1, 0.2], "context": 32, "batch": 2, "learning_rate": 0.01,
    "precision": "fp32", "checkpoint_every": 2, "log_every": 2, "device": "cpu", "trainer": {"report_to": []},
}  # fmt: skip


@pytest.fixture
def train(tiny_dense: Path, tmp_path: Path) -> Train:
    """Runs finetune on the tiny model: train(state="a", load=..., see=..., **settings)."""

    def run(
        state: str = "state",
        load: Callable[[], PreTrainedModel] | None = None,
        see: Callable[[Any], None] | None = None,
        note: Callable[[str], None] = lambda message: None,
        teacher: PreTrainedModel | None = None,
        **settings: Any,
    ) -> Finetuned:
        source = Source("test", [f"{i}: the quick brown fox jumps over {i} lazy dogs" for i in range(40)])
        return finetune(
            load or (lambda: load_dense(str(tiny_dense), dtype="float32")),
            load_tokenizer(str(tiny_dense)),
            source,
            FinetuneSettings().updated(QUICK | settings, source="test"),
            tmp_path / state,
            see=see,
            note=note,
            teacher=teacher,
        )

    return run
