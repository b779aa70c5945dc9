"""Random models of named shapes: real shapes, seeded and usable weights, thresholds for many sparsities at once."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from sparsify.calibration import hooked
from sparsify.errors import SparsifyError
from sparsify.evals import shapes
from sparsify.evals.realised import RealisedDensity
from sparsify.evals.shapes import (
    random_calibration,
    random_model,
    random_tokens,
    save_random,
    set_thresholds,
    shape_config,
    sparse_random_model,
    teal_thresholds,
)
from sparsify.ledger import ledger_of
from sparsify.models import load_dense, load_tokenizer
from sparsify.runtime import sparse_layers

_SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 5000.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "small", (LlamaConfig, {**_SMALL, "tie_word_embeddings": False}))
    monkeypatch.setitem(shapes.SHAPES, "small-tied", (Qwen2Config, {**_SMALL, "tie_word_embeddings": True}))


@pytest.mark.parametrize(
    ("name", "parameters", "tied", "biases"),
    [
        ("llama-100m", 100_092_672, True, set()),
        ("qwen-0.5b", 494_032_768, True, {"q_proj", "k_proj", "v_proj"}),
        ("tinyllama-1.1b", 1_100_048_384, False, set()),
    ],
)
def test_shapes_are_the_published_ones(name: str, parameters: int, tied: bool, biases: set[str]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert {key.split(".")[-2] for key, _ in model.named_parameters() if key.endswith("bias")} == biases


@pytest.mark.parametrize("name", ["small", "small-tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_seeded_and_whole(name: str, dtype: torch.dtype) -> None:
    model, again, other = (random_model(name, dtype=dtype, seed=seed) for seed in (3, 3, 4))
    for (key, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
        # Fresh memory is poisoned with NaN in these tests.
        assert a.isfinite().all(), key
        assert torch.equal(a, c) == ("norm" in key)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "small-tied")
    assert not model.training
    expected = type(model)(shape_config(name)).model.rotary_emb.inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_activations_neither_grow_nor_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, values = shapes.SHAPES["small"]
    monkeypatch.setitem(shapes.SHAPES, "deep", (kind, {**values, "num_hidden_layers": 22}))
    model = random_model("deep")
    sizes: dict[str, float] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    with hooked(linears, lambda name, x: sizes.__setitem__(name, float(x.float().square().mean().sqrt()))):
        tokens = random_tokens(model, 1, 64)
        with torch.inference_mode():
            logits = model(tokens).logits.float()
    assert all(0.1 < size < 3 for size in sizes.values()), sizes
    # Tokens differ to the end: a deep random model that averages over its context says the same everywhere.
    normal = torch.nn.functional.normalize(logits[0, 32:], dim=-1)
    assert float((normal @ normal.T).mean()) < 0.7


def test_tokens_and_calibration() -> None:
    model = random_model("small")
    tokens = random_tokens(model, 3, 20, seed=1)
    assert tokens.shape == (3, 20)
    assert tokens.dtype == torch.int64
    assert 0 <= int(tokens.min()) < int(tokens.max()) < 300
    assert torch.equal(tokens, random_tokens(model, 3, 20, seed=1))
    assert not torch.equal(tokens, random_tokens(model, 3, 20, seed=2))
    assert random_calibration(model).tokens.shape == (4, 128)


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_sparse_models_keep_what_was_asked_for(method: str) -> None:
    model = sparse_random_model("small", 0.5, method, dtype=torch.float32)
    with RealisedDensity(model) as realised, torch.inference_mode():
        model(random_tokens(model, 4, 100, seed=9))
    ledger = ledger_of(model).with_densities(realised.densities())
    # Other tokens, and inputs that the sparse layers before have changed.
    assert abs(ledger.weighted_sparsity - 0.5) < 0.05


def test_thresholds_are_those_of_a_conversion() -> None:
    dense = random_model("small", dtype=torch.float32)
    found = teal_thresholds(dense, random_calibration(dense), (0.0, 0.4, 0.7))
    for sparsity, thresholds in found.items():
        layers = sparse_layers(sparse_random_model("small", sparsity, dtype=torch.float32))
        assert {name: float(layer.threshold) for name, layer in layers.items()} == pytest.approx(thresholds)


def test_skipped_positions_do_not_count() -> None:
    model = random_model("small", dtype=torch.float32)
    calibration = random_calibration(model, 6, 80)
    name, seen = "model.layers.2.self_attn.o_proj", []
    with hooked({name: model.get_submodule(name)}, lambda _, x: seen.append(x)), torch.inference_mode():
        for window in calibration.tokens:
            model(window[None])
    tail = torch.cat(seen)[:, 60:].abs()
    threshold = teal_thresholds(model, calibration, (0.5,), skip=60)[0.5][name]
    # A bin of the histogram is 0.4% wide, and a threshold's 4 bytes come out of the budget.
    assert float((tail > threshold).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert teal_thresholds(model, calibration, (0.5,))[0.5][name] > threshold


def test_thresholds_are_set_in_place() -> None:
    model = sparse_random_model("small", 0.5)
    layers = sparse_layers(model)
    before = {name: layer.threshold.data_ptr() for name, layer in layers.items()}
    set_thresholds(model, dict.fromkeys(layers, 0.25))
    assert {name: layer.threshold.data_ptr() for name, layer in layers.items()} == before
    assert {float(layer.threshold) for layer in layers.values()} == {0.25}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SparsifyError, match=r"unknown shape 'tinylama-1.1b'.*Did you mean 'tinyllama-1.1b'\?"):
        random_model("tinylama-1.1b")
    with pytest.raises(SparsifyError, match=r"unknown method 'tea'.*Did you mean 'teal'\?"):
        sparse_random_model("small", 0.5, "tea")


@pytest.mark.parametrize("name", ["small", "small-tied"])
def test_saved_models_load_with_their_tokenizer(name: str, tmp_path: Path) -> None:
    folder = save_random(name, tmp_path / name, seed=5)
    model, expected = load_dense(str(folder)), random_model(name, seed=5)
    assert model.dtype == torch.bfloat16
    for (key, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), key
    tokenizer = load_tokenizer(str(folder))
    text = "def café():\n\treturn 1"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
