"""Decode speed: the result is complete and consistent. No timing is asserted."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.calibration import Calibration
from sparsify.conversion import convert
from sparsify.errors import SparsifyError
from sparsify.evals import speed
from sparsify.evals.speed import Spread, decode_speed
from sparsify.ledger import ledger_of
from sparsify.methods.teal import Teal


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_COPY_BYTES", 1 << 16)


def _model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _prompt(batch: int = 1, length: int = 6) -> torch.Tensor:
    return torch.randint(48, (batch, length))


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([float(i) for i in range(11)][::-1]) == Spread(5.0, 1.0, 9.0)


def test_both_sides_are_measured_and_the_bytes_are_the_ledgers() -> None:
    model = _model()
    convert(model, Teal(sparsity=0.5), Calibration(torch.randint(48, (4, 16)), "random"))
    seen: list[tuple[int, int]] = []
    result = decode_speed(model, _prompt(2), new_tokens=3, rounds=2, progress=lambda a, b: seen.append((a, b)))
    assert seen == [(1, 2), (2, 2)]
    assert result.sparse is not None
    assert result.ratio is not None
    assert result.realised_sparsity is not None
    assert result.batch == 2
    assert result.backends == ["reference"]
    assert 0.2 < result.realised_sparsity < 0.8
    ledger = ledger_of(model)
    assert result.dense.bytes_per_token == ledger.dense_bytes + ledger.rest_bytes
    saved = result.dense.bytes_per_token - result.sparse.bytes_per_token
    assert saved == pytest.approx(result.realised_sparsity * ledger.dense_bytes)
    for side in (result.dense, result.sparse):
        assert 0 < side.ms_per_step.p10 <= side.ms_per_step.median <= side.ms_per_step.p90
        assert side.tokens_per_second == pytest.approx(2e3 / side.ms_per_step.median)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["versions"]["torch"] == torch.__version__
    assert data["copy_gb_per_second"] > 0
    assert data["prefill"] == "sparse"


def test_a_dense_model_has_the_dense_side_only() -> None:
    model = _model()
    result = decode_speed(model, _prompt(), new_tokens=2, rounds=1)
    assert result.sparse is None
    assert result.ratio is None
    assert result.backends == []
    embedding = model.get_input_embeddings().weight
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    # Every weight, of the input embedding one row.
    assert result.dense.bytes_per_token == parameters - embedding.nbytes + embedding[0].nbytes


def test_bad_input_is_refused() -> None:
    model = _model()
    with pytest.raises(SparsifyError, match=r"\[batch, tokens\], not of shape \[6\]"):
        decode_speed(model, _prompt()[0])
    with pytest.raises(SparsifyError, match="at least 1, not 0 and 5"):
        decode_speed(model, _prompt(), new_tokens=0)
    with pytest.raises(SparsifyError, match="74 tokens are more than this model's 32 positions"):
        decode_speed(model, _prompt(), new_tokens=64)
