"""The trained reference model, in fp32, and its activations."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration
from sparsify.calibration import hooked


@pytest.fixture(scope="package")
def trained() -> PreTrainedModel:
    """The bundled reference model; to be read only."""
    return sparsify.load_dense("reference", dtype="float32")


@pytest.fixture(scope="package")
def trained_calibration() -> Calibration:
    text = sparsify.read_text("stdlib:calibration")
    # A part of it: the whole takes half a minute to tokenise.
    part = sparsify.Text(text.name, text.documents[:8])
    return Calibration.from_text(part, sparsify.load_tokenizer("reference"), sequences=4, seq_len=128)


@pytest.fixture(scope="package")
def trained_inputs(trained: PreTrainedModel, trained_calibration: Calibration) -> dict[str, Tensor]:
    """Inputs [T, I] of two linears on the calibration text."""
    names = ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj")
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = {name: trained.get_submodule(name) for name in names}
    with torch.no_grad(), hooked(modules, lambda name, x: seen[name].append(x.flatten(0, -2))):
        for window in trained_calibration.tokens:
            trained(window[None], use_cache=False)
    return {name: torch.cat(parts) for name, parts in seen.items()}
