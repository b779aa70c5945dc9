"""LaRoSA's split: 0.8 p and 1.2 p of the channels, the bytes met by p, for any method."""

import pytest
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, RSparse, SparsifyError, Teal
from sparsify.methods import Method


@pytest.mark.parametrize("method", [Teal(0.5), Teal(0.5, compensate=True)], ids=["teal", "compensated"])
def test_densities_have_the_papers_coefficients(
    method: Method, tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    sparsify.convert(tiny_llama, method, tiny_calibration, allocation="larosa")
    ledger = sparsify.ledger_of(tiny_llama)
    assert ledger.touched_bytes == pytest.approx(0.5 * ledger.dense_bytes, abs=0.01)
    p = [
        (1 - linear.density) / (1.2 if linear.name.endswith(("o_proj", "down_proj")) else 0.8)
        for linear in ledger.linears
    ]
    assert p == pytest.approx([p[0]] * len(p), abs=1e-9)


def test_at_high_sparsity_o_and_down_keep_a_channel(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, Teal(0.85), tiny_calibration, allocation="larosa")
    ledger = sparsify.ledger_of(tiny_llama)
    assert ledger.touched_bytes == pytest.approx(0.15 * ledger.dense_bytes, abs=0.01)
    least = min(ledger.linears, key=lambda linear: linear.density)
    assert least.density == pytest.approx(1 / least.inputs, rel=1e-6)


def test_refusals(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with pytest.raises(SparsifyError, match="one channel of each linear take"):
        sparsify.convert(tiny_llama, Teal(0.995), tiny_calibration, allocation="larosa")
    recipe = {"model.layers.0.self_attn.q_proj": {"sparsity": 0.5, "rho": 0.9}}
    with pytest.raises(SparsifyError, match="allocation larosa chooses each linear's share, and so does the recipe"):
        sparsify.convert(tiny_llama, RSparse(0.5, recipe=recipe), tiny_calibration, allocation="larosa")
