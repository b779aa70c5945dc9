"""The estimate of how sparse a dense model could be, against models whose answer is known."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparsify.calibration import Calibration
from sparsify.evals.headroom import headroom, share_at


def _model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _calibration() -> Calibration:
    return Calibration(torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0)), "random")


def test_columns_that_are_zero_can_go() -> None:
    model = _model()
    before = {kind.linear: kind for kind in headroom(model, _calibration())}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight[:, ::2] = 0
    after = {kind.linear: kind for kind in headroom(model, _calibration())}
    assert list(after) == list(before)
    assert len(after) == 8
    for name, kind in after.items():
        assert before[name].sparsity["0.01"] < 0.5
        # Half of the columns cost nothing, and the rest is not zero.
        assert 0.5 <= kind.sparsity["0.01"] < 0.8
        assert kind.sparsity["0.01"] < kind.sparsity["0.05"]
    everything = sum(kind.bytes * kind.sparsity["0.01"] for name, kind in after.items() if name != "all")
    assert after["all"].sparsity["0.01"] == pytest.approx(everything / after["all"].bytes)


def test_zeros_of_the_inputs_are_counted() -> None:
    model = _model()
    model.config.hidden_act = "relu"
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    found = {kind.linear: kind.zeros for kind in headroom(model, _calibration())}
    assert 0.3 < found["mlp.down_proj"] < 0.7
    assert found["self_attn.q_proj"] == 0.0


@pytest.mark.parametrize(
    ("curve", "share"),
    [([0.0] * 9, 0.9), ([1.0] * 9, 0.001), ([0.0, 0.02, *[1.0] * 7], 0.15), ([0.0] * 8 + [1.0], 0.801)],
    ids=["never reached", "at once", "half a step", "the last step"],
)
def test_the_share_is_read_from_the_curve(curve: list[float], share: float) -> None:
    assert share_at(curve, 0.01) == pytest.approx(share)
