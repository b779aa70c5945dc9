"""PPL-p% sparsity against plain masks on small random models, its natural zeros, and the checkpoint that has it."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsify
from sparsify import SparsifyError
from sparsify.calibration import Calibration
from sparsify.evals.padded import PaddedWindows
from sparsify.evals.perplexity import perplexity
from sparsify.evals.ppl_p import apply_point, measure_ppl_p
from sparsify.evals.ppl_p_result import Point
from sparsify.evals.realised import RealisedDensity
from sparsify.linear import SparseLayer
from sparsify.runtime import sparse_layers
from sparsify.text import Windows
from sparsify.text import windows as cut_windows

_BASE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GATED = {**_BASE, "intermediate_size": 48, "num_key_value_heads": 2}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu-gated": ("LlamaConfig", _GATED),
    "relu-gated": ("LlamaConfig", {**_GATED, "hidden_act": "relu"}),
    "fused-gated": ("Phi3Config", _GATED),
    "relu": ("OPTConfig", {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gelu-conv1d": (
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 48},
    ),
}
_RELU = ("relu-gated", "relu")
_DOWN = {"silu-gated": "model.layers.{}.mlp.down_proj", "relu": "model.decoder.layers.{}.fc2"}


def make(name: str) -> PreTrainedModel:
    """A random model whose logits are far from uniform and depend on every neuron."""
    config, options = _MODELS[name]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(getattr(transformers, config)(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise) if parameter.dim() > 1 else parameter.add_(0.1 * noise)
    return model


def random_windows(count: int = 6, length: int = 16) -> Windows:
    return Windows(
        tokens=torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(2)),
        scored_from=torch.ones(count, dtype=torch.int64), token_bytes=torch.ones(count, length, dtype=torch.int64),
        stride=length, bos=False, byte_count="offsets", name="random", sha256="0" * 64,
    )  # fmt: skip


def likely_windows(model: PreTrainedModel) -> Windows:
    """Windows that the model itself would write, so that what is dropped makes them less likely."""
    windows = random_windows()
    with torch.no_grad():
        ids = model.generate(windows.tokens[:, :2], max_new_tokens=14, min_new_tokens=14, do_sample=False)
    return Windows(**{**vars(windows), "tokens": ids})


def masked_nll(model: PreTrainedModel, windows: Windows, masks: Callable[[str, Tensor], Tensor]) -> float:
    """Perplexity's nll with each down projection's input multiplied by a mask: the definition, in one forward."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: (args[0] * masks(name, args[0]),))
        for name, module in model.named_modules()
        if name.endswith(("down_proj", "fc2"))
    ]
    with torch.no_grad():
        logits = model(windows.tokens).logits
    for handle in handles:
        handle.remove()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows.tokens[:, 1:].flatten()))


@pytest.fixture(scope="module", params=_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


P = (0.01, 0.05, 0.2)


def test_rises_are_within_p_and_sparsity_grows_with_it(name: str) -> None:
    model = make(name)
    windows = likely_windows(model)
    found = measure_ppl_p(model, windows, p=(0.2, 0.01, 0.05))
    assert [point.p for point in found.points] == list(P)
    for point in found.points:
        assert point.p is not None
        assert point.rise == pytest.approx(math.expm1(point.nll_per_token - found.dense.nll_per_token))
        # 90 tokens: one neuron of one token may be a step larger than the tolerance.
        assert 0.5 * point.p < point.rise <= point.p
        assert point.sparsity == pytest.approx(1 - sum(layer.activation_ratio for layer in point.layers) / 2)
        # One CETT for all layers.
        for layer in point.layers:
            assert layer.cett == pytest.approx(point.setting, rel=0.05)
    assert 0.0 < found.points[0].sparsity < found.points[1].sparsity < found.points[2].sparsity < 1.0
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("which", _DOWN)
def test_the_point_is_what_plain_masks_give(which: str) -> None:
    model = make(which)
    windows = likely_windows(model)
    (point,) = measure_ppl_p(model, windows, p=[0.05]).points
    cuts = {layer.name: layer.cut for layer in point.layers}
    assert list(cuts) == [_DOWN[which].format(block) for block in range(2)]
    shares: dict[str, float] = {}

    def masks(name: str, h: Tensor) -> Tensor:
        norms = (model.get_submodule(name).weight.detach() ** 2).sum(0).sqrt()  # type: ignore[operator]
        keep = h.abs() * norms > cuts[name]
        shares[name] = float(keep.float().mean())
        return keep

    assert masked_nll(model, windows, masks) == pytest.approx(point.nll_per_token, rel=1e-5)
    assert shares == pytest.approx({layer.name: layer.activation_ratio for layer in point.layers}, abs=2e-3)


@pytest.mark.parametrize("which", _RELU)
def test_natural_zeros_are_dropped_for_nothing(which: str) -> None:
    model = make(which)
    windows = likely_windows(model)
    found = measure_ppl_p(model, windows, p=[1e-12], rules=["cett", "zero"])
    tiny, zero = found.points
    natural = found.to_dict()["natural"]
    assert 0.3 < natural["zero_ratio"] < 0.7
    # Exactly: what is masked is zero already.
    assert (zero.p, zero.rise, zero.perplexity) == (None, 0.0, found.dense.perplexity)
    assert zero.sparsity == pytest.approx(natural["dynamic_dead_rate"], abs=1e-12)
    assert tiny.sparsity >= natural["zero_ratio"] - 1e-12
    # The smallest neurons of 90 tokens may lower perplexity.
    assert tiny.sparsity < natural["zero_ratio"] + 0.1
    for layer, point in zip(found.natural, zero.layers, strict=True):
        assert point.activation_ratio == pytest.approx(1 - layer.zero_ratio, abs=1e-12)


def test_silu_has_no_natural_zeros() -> None:
    model = make("silu-gated")
    natural = measure_ppl_p(model, random_windows(), p=[0.05], rules=["zero"]).to_dict()["natural"]
    assert (natural["zero_ratio"], natural["dynamic_dead_rate"], natural["static_dead"]) == (0.0, 0.0, 0)


def test_static_dead_neurons_are_counted() -> None:
    model: Any = make("relu")
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias[:5] = -1000.0
    before = measure_ppl_p(make("relu"), random_windows(), p=[0.05], rules=["zero"]).natural
    after = measure_ppl_p(model, random_windows(), p=[0.05], rules=["zero"]).natural
    assert [layer.static_dead - old.static_dead for layer, old in zip(after, before, strict=True)] == [0, 5]
    assert after[1].dynamic_dead_rate > before[1].dynamic_dead_rate


@pytest.mark.parametrize("which", ["silu-gated", "relu"])
def test_the_other_rules_are_the_papers(which: str) -> None:
    model = make(which)
    windows = likely_windows(model)
    activations: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("act_fn", "activation_fn")):
            block = int(name.split("layers.")[1][0])
            down = _DOWN[which].format(block)
            module.register_forward_hook(lambda _, args, s, down=down: activations.update({down: s}))
    top, fat = measure_ppl_p(model, windows, p=[0.1], rules=["top-k", "fatrelu"]).points
    assert {layer.cut for layer in fat.layers} == {fat.setting}
    assert len({layer.cut for layer in top.layers}) == 1

    def largest(name: str, h: Tensor) -> Tensor:
        s = activations[name].reshape(h.shape).abs()
        kth = s.sort(dim=-1, descending=True).values[..., int(top.layers[0].cut) - 1, None]
        return s >= kth

    def above(name: str, h: Tensor) -> Tensor:
        return activations[name].reshape(h.shape).abs() >= fat.setting

    assert masked_nll(model, windows, largest) == pytest.approx(top.nll_per_token, rel=1e-5)
    assert masked_nll(model, windows, above) == pytest.approx(fat.nll_per_token, rel=1e-5)
    for layer in top.layers:
        assert layer.activation_ratio == layer.cut / 48
    assert top.layers[0].cett is None


def test_pads_change_nothing() -> None:
    model = make("silu-gated")
    windows = likely_windows(model)
    lengths = torch.tensor([16, 3, 9, 16, 12, 5])
    padded = PaddedWindows(**vars(windows), lengths=lengths)
    other = PaddedWindows(**vars(windows) | {"tokens": windows.tokens.where(padded.real, 5)}, lengths=lengths)
    first, second = (measure_ppl_p(model, each, p=[0.1], batch_size=4) for each in (padded, other))
    assert first.dense.tokens == int(lengths.sum()) - 6
    assert second.points[0].sparsity == pytest.approx(first.points[0].sparsity, abs=1e-3)
    assert second.points[0].nll_per_token == pytest.approx(first.points[0].nll_per_token, rel=1e-4)
    assert measure_ppl_p(model, windows, p=[0.1]).points[0].nll_per_token != first.points[0].nll_per_token


def test_it_is_deterministic_and_batches_change_nothing() -> None:
    model = make("silu-gated")
    windows = likely_windows(model)
    first = measure_ppl_p(model, windows, p=P, batch_size=6)
    assert measure_ppl_p(model, windows, p=P, batch_size=6).to_dict() == first.to_dict()
    other = measure_ppl_p(model, windows, p=P, batch_size=1)
    assert [point.sparsity for point in other.points] == pytest.approx([q.sparsity for q in first.points], abs=0.01)


def saved_and_loaded(
    model: PreTrainedModel, point: Point, windows: Windows, folder: Path, *, scope: str = "mlp", backend: str | None
) -> PreTrainedModel:
    sparse = apply_point(model, point, scope=scope, calibration=Calibration(windows.tokens, windows.name))
    sparsify.save(sparse, folder)
    assert sparsify.verify(folder) == []
    return sparsify.load(folder, backend=backend)


@pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "fastest"])
def test_the_checkpoint_is_the_model_that_was_measured(name: str, backend: str | None, tmp_path: Path) -> None:
    model = make(name)
    windows = likely_windows(model)
    found = measure_ppl_p(model, windows, p=[0.05])
    (point,) = found.points
    loaded = saved_and_loaded(copy.deepcopy(model), point, windows, tmp_path / "sparse", backend=backend)
    config = loaded.config.quantization_config
    assert config.method == "ppl-p"
    assert config.method_config["p"] == 0.05
    assert config.method_config["cett"] == point.setting
    assert set(sparse_layers(loaded)) == {layer.name for layer in point.layers}
    assert "that ppl-p leaves dense" in " ".join(config.left_dense)
    with RealisedDensity(loaded) as realised:
        quality = perplexity(loaded, windows)
    measured = {layer.name: layer.activation_ratio for layer in point.layers}
    if backend == "reference" and name != "gelu-conv1d":
        assert quality.nll_per_token == point.nll_per_token
        assert realised.densities() == measured
    else:
        # Another order of summation than in torch's own product.
        assert quality.nll_per_token == pytest.approx(point.nll_per_token, rel=1e-4)
        assert realised.densities() == pytest.approx(measured, abs=2e-3)
    with sparsify.dense(loaded):
        assert perplexity(loaded, windows).nll_per_token == pytest.approx(found.dense.nll_per_token, rel=1e-5)


def test_the_ledger_of_the_checkpoint_counts_the_down_projections(tmp_path: Path) -> None:
    model = make("silu-gated")
    windows = likely_windows(model)
    (point,) = measure_ppl_p(model, windows, p=[0.05]).points
    loaded = saved_and_loaded(model, point, windows, tmp_path / "sparse", backend=None)
    ledger = sparsify.ledger_of(loaded)
    ratios = {layer.name: layer.dense_activation_ratio for layer in point.layers}
    assert {linear.name: linear.density for linear in ledger.linears} == ratios
    assert ledger.nominal_sparsity == pytest.approx(1 - sum(r for r in ratios.values() if r is not None) / 2)
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert loaded.generate(windows.tokens[:1, :5], **greedy).shape == (1, 9)


def test_channels_of_every_linear(tmp_path: Path) -> None:
    model = make("silu-gated")
    windows = likely_windows(model)
    found = measure_ppl_p(model, windows, p=[0.05], scope="linears")
    (point,) = found.points
    assert found.to_dict()["metric"] == "PPL-p% channel sparsity"
    assert len(point.layers) == 14
    loaded = saved_and_loaded(model, point, windows, tmp_path / "sparse", scope="linears", backend="reference")
    assert all(isinstance(layer, SparseLayer) for layer in sparse_layers(loaded).values())
    with RealisedDensity(loaded) as realised:
        assert perplexity(loaded, windows).nll_per_token == point.nll_per_token
    assert realised.densities() == {layer.name: layer.activation_ratio for layer in point.layers}


def test_thresholds_may_come_from_another_text() -> None:
    model = make("silu-gated")
    windows = likely_windows(model)
    own = measure_ppl_p(model, windows, p=[0.05]).points[0]
    other = measure_ppl_p(model, windows, p=[0.05], cett_windows=random_windows(4, 12)).points[0]
    assert [layer.cut for layer in own.layers] != [layer.cut for layer in other.layers]
    assert 0.5 * 0.05 < other.rise <= 0.05


@pytest.mark.parametrize("p", [0.0, -0.01, float("nan"), float("inf"), "1%"])
def test_a_rise_that_is_none_is_refused(p: Any) -> None:
    with pytest.raises(SparsifyError, match=r"p is .* above 0"):
        measure_ppl_p(make("relu"), random_windows(), p=[p])


def test_other_rules_and_models_are_refused() -> None:
    model, windows = make("relu"), random_windows()
    with pytest.raises(SparsifyError, match="Did you mean 'fatrelu'"):
        measure_ppl_p(model, windows, p=[0.01], rules=["fatrelus"])
    (point,) = measure_ppl_p(model, windows, p=[0.05], rules=["zero"]).points
    calibration = Calibration(windows.tokens, windows.name)
    with pytest.raises(SparsifyError, match="rule zero has no thresholds"):
        apply_point(model, point, scope="mlp", calibration=calibration)
    (point,) = measure_ppl_p(model, windows, p=[0.05]).points
    apply_point(model, point, scope="mlp", calibration=calibration)
    with pytest.raises(SparsifyError, match="converted already"):
        apply_point(model, point, scope="mlp", calibration=calibration)


def test_the_trained_model_is_sparser_than_one_threshold_for_all_layers_finds_it() -> None:
    trained = sparsify.load_dense("reference", dtype="float32")
    text = sparsify.read_text("stdlib:evaluation")
    part = sparsify.Text(text.name, text.documents[:1])
    windows = cut_windows(part, sparsify.load_tokenizer("reference"), seq_len=64, limit=3)
    cett, fat = measure_ppl_p(trained, windows, p=[0.01], rules=["cett", "fatrelu"]).points
    assert cett.sparsity > fat.sparsity
    assert 0.4 < cett.sparsity < 0.9
