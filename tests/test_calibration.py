"""Calibration: streamed quantiles against torch's, what counts as calibration tokens, and what conversions refuse."""

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsify
from sparsify.calibration import Calibration, ScoreHistogram
from sparsify.errors import SparsifyError
from sparsify.kernels.reference import keep_mask
from sparsify.runtime import sparse_layers
from sparsify.text import Text, windows

COUNT = 50_000
DENSITIES = [0.005, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999]


def scores(kind: str) -> Tensor:
    x = torch.randn(COUNT, generator=torch.Generator().manual_seed(4))
    if kind == "normal":
        return x.abs()
    if kind == "shifted":
        return (x + 2.0).abs()
    if kind == "heavy-tailed":
        return torch.distributions.StudentT(1.0).sample((COUNT,)).abs()
    if kind == "outliers":
        return torch.where(torch.arange(COUNT) % 100 == 0, x.abs() * 1000, x.abs())
    if kind == "relu":
        return x.relu()
    if kind == "tiny":
        return x.abs() * 1e-30
    assert kind == "huge"
    return x.abs() * 1e30


KINDS = ["normal", "shifted", "heavy-tailed", "outliers", "relu", "tiny", "huge"]


def histogram_of(*parts: Tensor) -> ScoreHistogram:
    histogram = ScoreHistogram()
    for part in parts:
        histogram.add(part)
    return histogram


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_are_quantiles(kind: str, density: float) -> None:
    values = scores(kind)
    threshold = histogram_of(values).threshold(density)
    exact = float(values.quantile(1 - density))
    # A bin is 1/256 of an octave or less, and torch interpolates between two samples.
    assert threshold == pytest.approx(exact, rel=1 / 256 + 1e-4, abs=0.0)
    kept = float((values > threshold).double().mean())
    nonzero = float((values > 0).double().mean())
    assert kept == pytest.approx(min(density, nonzero), abs=0.002)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_one_shot(kind: str) -> None:
    values = scores(kind)
    whole = histogram_of(values)
    parts = histogram_of(*values.split([1, 7, 1000, COUNT - 1008]))
    assert torch.equal(whole.counts, parts.counts)
    assert all(whole.threshold(density) == parts.threshold(density) for density in DENSITIES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_coarse_dtypes(dtype: torch.dtype, density: float) -> None:
    values = scores("normal").to(dtype)
    threshold = histogram_of(values).threshold(density)
    assert float((values.float() > threshold).double().mean()) == pytest.approx(density, abs=0.005)


def test_signs_and_shapes_do_not_matter() -> None:
    values = torch.randn(4, 5, 6)
    assert torch.equal(histogram_of(values).counts, histogram_of(values.abs().flatten()).counts)
    assert torch.equal(histogram_of(values.transpose(0, 2)).counts, histogram_of(values).counts)


def test_edges() -> None:
    histogram = histogram_of(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert histogram.threshold(1.0) == -1.0
    # Three of four are exact zeros: dropping just these is the nearest to keeping half.
    assert histogram.threshold(0.5) == 0.0
    assert histogram.threshold(0.0) >= 1.0
    assert histogram_of(torch.tensor([-0.0, 2.0])).threshold(0.9) == 0.0


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_bad_values_count_as_the_largest(bad: float) -> None:
    values = torch.rand(1000)
    values[:10] = bad
    assert 0.4 < histogram_of(values).threshold(0.5) < 0.6
    assert not math.isfinite(histogram_of(values).threshold(0.005))


@pytest.mark.parametrize(
    "method",
    [sparsify.Teal(sparsity=0.4), sparsify.Wina(sparsity=0.4), sparsify.RSparse(sparsity=0.4, rho=0.8)],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_calibration_text_has_the_density_that_was_asked_for(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, method: object, dtype: torch.dtype
) -> None:
    model = sparsify.convert(tiny_llama.to(dtype), method, tiny_calibration)
    entries = model.config.quantization_config.linears
    kept: dict[str, list[Tensor]] = {name: [] for name in entries}
    for name, layer in sparse_layers(model).items():
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: kept[name].append(keep_mask(args[0], layer.threshold, layer.scale))
        )
    # Thresholds are fitted on the dense model's activations.
    with torch.no_grad(), sparsify.dense(model):
        for window in tiny_calibration.tokens:
            model(window[None])
    for name, masks in kept.items():
        assert float(torch.cat(masks, dim=1).float().mean()) == pytest.approx(entries[name].density, abs=0.01)


def test_conversion_is_deterministic_and_leaves_weights_alone(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in tiny_llama.named_parameters()}
    other = copy.deepcopy(tiny_llama).train()
    sparsify.convert(tiny_llama, sparsify.RSparse(sparsity=0.5, rho=0.8), tiny_calibration)
    sparsify.convert(other, sparsify.RSparse(sparsity=0.5, rho=0.8), tiny_calibration)
    after, again = tiny_llama.state_dict(), other.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: id(parameter) for name, parameter in tiny_llama.named_parameters()} == parameters
    assert after.keys() == again.keys()
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert other.training
    assert not tiny_llama.training
    assert not any(module._forward_pre_hooks for layer in sparse_layers(other).values() for module in [layer])


def test_progress_is_told(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    seen: list[tuple[str, int, int]] = []
    sparsify.convert(tiny_llama, sparsify.RSparse(sparsity=0.5), tiny_calibration, progress=lambda *s: seen.append(s))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["calibrate", "fit", "compare"]
    for stage in stages:
        counts = [(done, total) for name, done, total in seen if name == stage]
        assert counts == [(index + 1, counts[0][1]) for index in range(counts[0][1])]


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(0, 8, dtype=torch.int64),
        torch.zeros(2, 8),
        torch.zeros(2, 0).long(),
    ],
    ids=["one dimension", "no windows", "floating point", "no tokens"],
)
def test_what_is_not_tokens_is_refused(tokens: Tensor) -> None:
    with pytest.raises(SparsifyError, match="calibration tokens must be int64"):
        Calibration(tokens, "x")


def test_fingerprint_follows_the_tokens() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    one = Calibration(tokens, "a").fingerprint
    assert one == {**Calibration(tokens.clone(), "b").fingerprint, "source": "a"}
    assert (one["sequences"], one["seq_len"], len(one["sha256"])) == (3, 4, 64)
    assert one["sha256"] != Calibration(tokens.flip(0), "a").fingerprint["sha256"]


@pytest.mark.parametrize(("token", "message"), [(128, "token id 128"), (-1, "token id -1")])
def test_tokens_of_another_tokenizer_are_one_clear_error(tiny_llama: PreTrainedModel, token: int, message: str) -> None:
    tokens = torch.full((1, 8), 5)
    tokens[0, 3] = token
    with pytest.raises(SparsifyError, match=message):
        sparsify.convert(tiny_llama, sparsify.Teal(sparsity=0.5), Calibration(tokens, "x"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_one_clear_error(tiny_llama: PreTrainedModel, bad: float) -> None:
    # One token of 128 is broken: few enough that the thresholds alone would not show it.
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[7, 3] = bad
    tokens = torch.randint(8, 128, (2, 48), generator=torch.Generator().manual_seed(5))
    tokens[1, 40] = 7
    with pytest.raises(SparsifyError, match="not finite"):
        sparsify.convert(tiny_llama, sparsify.Teal(sparsity=0.5), Calibration(tokens, "x"))
    assert not sparse_layers(tiny_llama)


def test_a_converted_model_is_not_converted_again(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, sparsify.Teal(sparsity=0.5), tiny_calibration)
    with pytest.raises(SparsifyError, match="converted already"):
        sparsify.convert(tiny_llama, sparsify.Teal(sparsity=0.5), tiny_calibration)


def test_no_sequences_is_one_clear_error() -> None:
    with pytest.raises(SparsifyError, match="at least 1, not 0"):
        Calibration.from_text(Text("text", ["some text"]), None, sequences=0)  # type: ignore[arg-type]


def test_a_seed_draws_other_windows_of_the_same_text() -> None:
    text, tokenizer = Text("text", [" ".join(map(str, range(2000)))]), sparsify.load_tokenizer("reference")
    every = windows(text, tokenizer, seq_len=32).tokens.tolist()
    drawn = {
        seed: Calibration.from_text(text, tokenizer, sequences=8, seq_len=32, seed=seed).tokens.tolist()
        for seed in range(4)
    }
    # Seed 0 is what a conversion takes: spread evenly, the first and the last window among them.
    assert drawn[0] == Calibration.from_text(text, tokenizer, sequences=8, seq_len=32).tokens.tolist()
    assert (drawn[0][0], drawn[0][-1]) == (every[0], every[-1])
    for tokens in drawn.values():
        places = [every.index(window) for window in tokens]
        assert places == sorted(set(places))
    assert len({str(tokens) for tokens in drawn.values()}) == 4
    assert drawn[3] == Calibration.from_text(text, tokenizer, sequences=8, seq_len=32, seed=3).tokens.tolist()
    with pytest.raises(SparsifyError, match="seed 1 would draw the same ones"):
        Calibration.from_text(text, tokenizer, sequences=len(every), seq_len=32, seed=1)
