"""Thresholds that are given are used as they are, on the linears that are named."""

import pytest
import torch
from transformers import PreTrainedModel

from sparsify import Calibration, SparsifyError
from sparsify.known_thresholds import Known, apply_thresholds
from sparsify.runtime import sparse_layers
from sparsify.targets import dense_weight

_DOWN = "model.layers.1.mlp.down_proj"


def test_the_named_linears_become_sparse(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    known = {_DOWN: Known(threshold=0.123456789, density=0.25, error=0.01)}
    weight = dense_weight(tiny_llama.get_submodule(_DOWN)).clone()
    apply_thresholds(tiny_llama, known, method="ppl-p", options={"p": 0.01}, calibration=tiny_calibration)
    ((name, layer),) = sparse_layers(tiny_llama).items()
    assert name == _DOWN
    assert layer.threshold == torch.tensor(0.123456789)
    assert torch.equal(layer.weight, weight)
    assert layer.scale is not None
    torch.testing.assert_close(layer.scale, weight.norm(dim=0))
    config = tiny_llama.config.quantization_config
    assert (config.method, config.method_config) == ("ppl-p", {"sparsity": 0.75, "p": 0.01})
    assert config.sites == [[_DOWN]]
    assert config.left_dense == ["13 linears that ppl-p leaves dense"]
    entry = config.linears[_DOWN]
    assert (entry.density, entry.error, entry.scaled, entry.rank) == (0.25, 0.01, True, 0)
    assert layer.density == 0.25


@pytest.mark.parametrize(
    ("name", "density", "words"),
    [("model.norm", 0.5, "'model.norm' is not a linear in the blocks"), (_DOWN, 0.0, "keep no channel of .*down_proj")],
)
def test_what_cannot_be_is_refused(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, name: str, density: float, words: str
) -> None:
    with pytest.raises(SparsifyError, match=words):
        apply_thresholds(
            tiny_llama, {name: Known(1.0, density, 0.0)}, method="ppl-p", options={}, calibration=tiny_calibration
        )
    assert not sparse_layers(tiny_llama)
