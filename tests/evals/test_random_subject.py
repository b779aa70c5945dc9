"""A shape with random weights: one copy of them for several sparsities, whose thresholds fit decode steps."""

import pytest
import torch
from transformers import LlamaConfig

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals import random_subject as module
from sparsify.evals.random_subject import random_subject, weight_bytes
from sparsify.evals.shapes import SHAPES
from sparsify.evals.speed import decode_speed
from sparsify.runtime import sparse_layers

pytestmark = pytest.mark.usefixtures("small_stream")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that is made in no time."""
    values = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    monkeypatch.setitem(SHAPES, "tiny", (LlamaConfig, values))


def test_several_sparsities_share_the_weights() -> None:
    subject = random_subject("tiny", sparsities=[0.5, 0.7], prompt_tokens=16, length=36, batch=2)
    assert subject.tokens.shape == (2, 36)
    assert subject.model.dtype == torch.bfloat16
    assert subject.thresholds is not None
    result = decode_speed(
        subject.model, subject.tokens, prompt_tokens=16, rounds=1, rows=subject.dense(), thresholds=subject.thresholds
    )
    for name, asked in (("sparse-50", 0.5), ("sparse-70", 0.7)):
        side = result.sides[name]
        assert side.touched.nominal_sparsity == asked
        # Few tokens, small layers; what is asked for is nearly what the steps have.
        assert side.touched.realised_sparsity == pytest.approx(asked, abs=0.06)
    for name in ("dense-rows", "transformers"):
        # The dense copy has the same weights.
        assert result.sides.get(name) is None or (result.sides[name].logits_difference or 0.0) < 0.05


def test_other_methods_have_one_sparsity() -> None:
    subject = random_subject("tiny", sparsities=[0.5], method="wina", dtype="float32", prompt_tokens=8, length=20)
    assert subject.thresholds is None
    assert subject.model.dtype == torch.float32
    assert all(layer.scale is not None for layer in sparse_layers(subject.model).values())
    with pytest.raises(SparsifyError, match="wina has one sparsity in a run"):
        random_subject("tiny", sparsities=[0.5, 0.7], method="wina", prompt_tokens=8, length=20)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SparsifyError, match=r"unknown shape 'tiney'.*Did you mean 'tiny'"):
        random_subject("tiney", sparsities=[0.5], prompt_tokens=8, length=20)
    with pytest.raises(SparsifyError, match="unknown method 'teel'"):
        random_subject("tiny", sparsities=[0.5], method="teel", prompt_tokens=8, length=20)


def test_memory_is_looked_at_before_the_weights_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weight_bytes("tinyllama-1.1b", torch.bfloat16) == 2 * 1_100_048_384
    monkeypatch.setattr(module, "available_memory", lambda device: 3 << 30)
    with pytest.raises(UnavailableError, match=r"tinyllama-1\.1b needs 3\.7 GB of free memory, 3\.2 GB are there"):
        random_subject("tinyllama-1.1b", sparsities=[0.5], prompt_tokens=8, length=20)
