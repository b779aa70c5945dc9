"""CETT against values that can be computed by hand, and against a plain loop over stored activations."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from sparsify import SparsifyError
from sparsify.calibration import hooked
from sparsify.evals.cett import CettCurves
from sparsify.evals.neurons import layers_of
from sparsify.evals.padded import PaddedWindows
from sparsify.text import Windows


def _windows(count: int = 3, length: int = 10, vocabulary: int = 100) -> Windows:
    return Windows(
        tokens=torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(3)),
        scored_from=torch.ones(count, dtype=torch.int64), token_bytes=torch.ones(count, length, dtype=torch.int64),
        stride=length, bos=False, byte_count="offsets", name="random", sha256="0" * 64,
    )  # fmt: skip


def _curves(model: PreTrainedModel, windows: Windows, scope: str = "mlp") -> CettCurves:
    return CettCurves(model, layers_of(model, scope, windows.tokens[:1]), windows)


@pytest.fixture
def by_hand() -> PreTrainedModel:
    """An OPT of one block whose MLP gives neurons of length 0, 3, 4 and 12 at right angles, whatever the token."""
    config = OPTConfig(
        vocab_size=100, hidden_size=8, ffn_dim=4, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8,
        max_position_embeddings=32,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    layer = model.model.decoder.layers[0]
    with torch.no_grad():
        layer.fc1.weight.zero_()
        layer.fc1.bias.copy_(torch.tensor([-1.0, 6.0, 4.0, 12.0]))
        layer.fc2.weight.zero_()
        for neuron, norm in enumerate((2.0, 0.5, 1.0, 1.0)):
            layer.fc2.weight[neuron, neuron] = norm
        # The bias is no part of FFN(x).
        layer.fc2.bias.fill_(100.0)
    made: PreTrainedModel = model
    return made


def test_cett_is_the_value_by_hand(by_hand: PreTrainedModel) -> None:
    name = "model.decoder.layers.0.fc2"
    curves = _curves(by_hand, _windows())
    cuts = [0.0, 2.9, 3.0, 3.9, 4.0, 11.9, 12.0]
    tail = curves.tails({name: cuts})[name]
    expected = [0.0, 0.0, 3 / 13, 3 / 13, 5 / 13, 5 / 13, 1.0]
    assert tail.cett.tolist() == pytest.approx(expected, rel=1e-6)
    assert tail.error.tolist() == pytest.approx([value**2 for value in expected], rel=1e-6)
    assert tail.kept.tolist() == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0]
    natural = curves.natural[name]
    assert (natural.zero_ratio, natural.dead_ratio, natural.static_dead, natural.largest) == (0.25, 0.25, 1, 12.0)


@pytest.mark.parametrize(
    ("cett", "low", "high"),
    # The last threshold below the jump at the next neuron's length.
    [(0.0, 0.0, 3.0), (0.2, 2.99, 3.0), (3.01 / 13, 3.0, 4.0), (0.38, 3.99, 4.0), (0.39, 4.0, 12.0)],
)  # fmt: skip
def test_thresholds_end_below_the_jump(by_hand: PreTrainedModel, cett: float, low: float, high: float) -> None:
    (threshold,) = _curves(by_hand, _windows()).thresholds(cett).values()
    assert low <= threshold < high


def test_everything_is_dropped_from_1_on(by_hand: PreTrainedModel) -> None:
    assert list(_curves(by_hand, _windows()).thresholds(1.0).values()) == [12.0]


def _plain_cett(model: PreTrainedModel, windows: Windows, name: str, threshold: float, real: Tensor) -> float:
    """The definition, token by token, from activations that are all stored."""
    seen: list[Tensor] = []
    down: Any = model.get_submodule(name)
    with torch.no_grad(), hooked({name: down}, lambda _, x: seen.append(x.flatten(0, -2).double())):
        model(windows.tokens)
    weight = down.weight.detach().double()
    ratios = []
    for h, counted in zip(torch.cat(seen), real.flatten(), strict=True):
        if counted:
            neurons = weight * h
            tail = neurons[:, neurons.norm(dim=0) <= threshold].sum(1)
            ratios.append(float(tail.norm() / neurons.sum(1).norm()))
    return math.fsum(ratios) / len(ratios)


@pytest.mark.parametrize("scope", ["mlp", "linears"])
def test_every_layer_has_the_cett_asked_for(tiny_llama: PreTrainedModel, scope: str) -> None:
    windows = _windows()
    curves = _curves(tiny_llama, windows, scope)
    assert len(curves.natural) == (2 if scope == "mlp" else 14)
    real = torch.ones_like(windows.tokens)
    for cett in (0.03, 0.2, 0.6):
        for name, threshold in curves.thresholds(cett).items():
            # 30 tokens: the curve has steps, and one step may be larger than the tolerance of 1%.
            found = _plain_cett(tiny_llama, windows, name, threshold, real)
            assert found == pytest.approx(cett, rel=0.03)
            measured = curves.tails({key: [threshold] for key in curves.natural})[name]
            assert float(measured.cett) == pytest.approx(found, rel=1e-4)


def test_thresholds_rise_with_the_cett(tiny_llama: PreTrainedModel) -> None:
    curves = _curves(tiny_llama, _windows())
    values = [0.0, 0.001, 0.5, 0.01, 0.9, 0.1, 0.0101, 0.999, 1.0]
    for cett in values:
        curves.thresholds(cett)
    found = [curves.thresholds(cett) for cett in sorted(values)]
    for name in found[0]:
        thresholds = [by_name[name] for by_name in found]
        assert thresholds == sorted(thresholds)
        assert len(set(thresholds)) == len(values)


def test_a_cett_that_was_asked_for_takes_no_pass(tiny_llama: PreTrainedModel) -> None:
    curves = _curves(tiny_llama, _windows())
    first, passes = curves.thresholds(0.1), curves.passes
    assert curves.thresholds(0.1) == first
    assert curves.passes == passes
    assert _curves(tiny_llama, _windows()).thresholds(0.1) == first


def test_pads_count_nowhere(tiny_llama: PreTrainedModel) -> None:
    windows = _windows(count=2)
    lengths = torch.tensor([10, 4])
    padded = PaddedWindows(**vars(windows), lengths=lengths)
    other = replace(padded, tokens=torch.where(padded.real, padded.tokens, 7))
    first, second = _curves(tiny_llama, padded), _curves(tiny_llama, other)
    for name, natural in first.natural.items():
        assert natural.tokens == 14
        assert natural.largest == second.natural[name].largest
    thresholds = first.thresholds(0.1)
    assert second.thresholds(0.1) == pytest.approx(thresholds, rel=1e-5)
    for name, threshold in thresholds.items():
        found = _plain_cett(tiny_llama, padded, name, threshold, padded.real)
        everything = _plain_cett(tiny_llama, padded, name, threshold, torch.ones_like(padded.tokens))
        assert found == pytest.approx(0.1, rel=0.05)
        assert abs(found - 0.1) < abs(everything - 0.1)


def test_chunks_change_nothing(tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _curves(tiny_llama, _windows())
    monkeypatch.setattr("sparsify.evals.cett._CHUNK", 3 * 96)
    parts = _curves(tiny_llama, _windows())
    assert parts.thresholds(0.1) == pytest.approx(whole.thresholds(0.1), rel=1e-5)
    assert all((parts.natural[n].alive == whole.natural[n].alive).all() for n in whole.natural)


def test_activations_that_are_no_numbers_are_refused(tiny_llama: PreTrainedModel) -> None:
    broken: Any = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(SparsifyError, match=r"layers\.1\.mlp\.down_proj are not finite on random"):
        _curves(broken, _windows())


def test_unknown_scopes_are_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(SparsifyError, match="Did you mean 'linears'"):
        layers_of(tiny_llama, "linear", torch.ones(1, 4, dtype=torch.int64))
