"""What neurons do, against plain loops over one MLP's activations."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import sparsify
from sparsify import Calibration, SparsifyError
from sparsify.evals.neuron_activity import neuron_activity
from sparsify.methods.relu import Relu
from sparsify.text import Windows

_SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture
def text() -> Windows:
    tokens = torch.randint(0, 32, (3, 12), generator=torch.Generator().manual_seed(1))
    return Windows(tokens, torch.ones(3, dtype=torch.int64), torch.ones_like(tokens), 12, False, "exact", "random", "")


def _model() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, hidden_act="relu")).eval()
    with torch.no_grad():
        # Two neurons that are never on: their gates are 0.
        model.model.layers[1].mlp.gate_proj.weight[[3, 7]] = 0.0
    return model


def _on(model: Any, text: Windows) -> list[Tensor]:
    """Returns which neurons of the second MLP are on, [T, F] for each window."""
    seen: list[Tensor] = []
    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda _, args, y: seen.append(y[0] > 0))
    with torch.no_grad():
        for window in text.tokens:
            model(window[None], use_cache=False)
    handle.remove()
    return seen


def test_counts_are_those_of_plain_loops(text: Windows) -> None:
    model = _model()
    windows = [window.tolist() for window in _on(model, text)]
    rows = [row for window in windows for row in window]
    total, size = len(rows), len(rows[0])
    p = [sum(row[i] for row in rows) / total for i in range(size)]
    alive = [i for i in range(size) if p[i] > 0]
    joint = {(i, j): sum(r[i] and r[j] for r in rows) / total for i in alive for j in alive if i != j}
    repeated = [
        sum(a and b for a, b in zip(one, two, strict=True)) / sum(two)
        for window in windows
        for one, two in itertools.pairwise(window)
        if any(two)
    ]
    found = neuron_activity(model, text)[1]
    assert (found.mlp, found.neurons) == ("model.layers.1.mlp.down_proj", size)
    assert found.zeros == pytest.approx(1 - sum(p) / size)
    assert found.dead == size - len(alive) >= 2
    assert found.lift == pytest.approx(sum(joint.values()) / sum(p[i] * p[j] for i, j in joint))
    assert found.partner == pytest.approx(
        sum(max(joint[i, j] for j in alive if j != i) / p[i] for i in alive) / len(alive)
    )
    assert found.repeated == pytest.approx(sum(repeated) / len(repeated))


def test_a_converted_model_does_the_same(text: Windows) -> None:
    model = _model()
    calibration = Calibration(text.tokens, "random")
    expected = neuron_activity(model, text)
    assert neuron_activity(sparsify.convert(copy.deepcopy(model), Relu(), calibration), text) == expected
    cut = neuron_activity(sparsify.convert(copy.deepcopy(model), Relu(cut=0.5), calibration), text)
    assert all(more.zeros > less.zeros for more, less in zip(cut, expected, strict=True))


def test_what_has_no_neurons_is_refused(text: Windows) -> None:
    mixtral = MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=2, head_dim=8)).eval()
    with pytest.raises(SparsifyError, match="MixtralForCausalLM has no neurons to watch: no MLP of linears"):
        neuron_activity(mixtral, text)
    teal = sparsify.convert(_model(), sparsify.Teal(0.5), Calibration(text.tokens, "random"))
    with pytest.raises(SparsifyError, match="its checkpoint does not cut neurons"):
        neuron_activity(teal, text)
