"""LaRoSA against its paper's equations, written out on the reference model's activations, and its two forms on disk."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

import sparsify
from sparsify import Calibration, Larosa, SparsifyError
from sparsify.calibration import hooked
from sparsify.errors import CheckpointError
from sparsify.evals.compare import parse_method
from sparsify.evals.realised import RealisedDensity
from sparsify.runtime import sparse_layers
from sparsify.token_layer import RotatedTopKConv1D, RotatedTopKLinear, TopKLinear

Q, K, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")  # noqa: E741
LAYER, MODEL = Larosa(0.5, rotation="layer"), Larosa(0.5)


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def inputs_of(model: PreTrainedModel, calibration: Calibration, names: list[str]) -> dict[str, Tensor]:
    """Inputs [T, I] of linears on the whole calibration text, dense."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = {name: model.get_submodule(name) for name in names}
    with torch.no_grad(), hooked(modules, lambda name, x: seen[name].append(x.flatten(0, -2))):
        for window in calibration.tokens:
            model(window[None], use_cache=False)
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


def top_k(z: Tensor, k: int) -> Tensor:
    """The k entries of each row of z [T, I] with the largest magnitudes, the others 0, in plain loops."""
    kept = torch.zeros_like(z)
    for n, row in enumerate(z.tolist()):
        for j in sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))[:k]:
            kept[n, j] = row[j]
    return kept


def papers_rotation(x: Tensor) -> Tensor:
    """Q: eigenvectors of XᵀX + 0.01·mean(diag)·1 as columns, by decreasing eigenvalue."""
    h = x.T @ x
    values, vectors = torch.linalg.eigh(h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype))
    return vectors[:, values.argsort(descending=True)]


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.3.mlp.up_proj"])
def test_layer_form_is_the_papers_on_real_activations(
    trained: PreTrainedModel, trained_calibration: Calibration, name: str
) -> None:
    """ŷ = (W Q) topk(Qᵀ x): Q of the input of this layer alone."""
    x = inputs_of(trained, trained_calibration, [name])[name]
    model = sparsify.convert(copy.deepcopy(trained), LAYER, trained_calibration)
    layer = sparse_layers(model)[name]
    assert type(layer) is RotatedTopKLinear
    q, weight = papers_rotation(x), layer.weight.detach().double()
    few, k = x[:8], int(layer.threshold)
    expected = top_k(few @ q, k) @ (weight @ q).T
    # fp32 products, and an eigenbasis of sums in another order.
    torch.testing.assert_close(layer(few.float()).detach().double(), expected, rtol=1e-3, atol=1e-3)
    assert (layer.keep(x.float()).sum(-1) == k).all()


@pytest.mark.parametrize("name", [Q, O, "model.layers.4.mlp.down_proj"])
def test_model_form_is_the_papers_on_real_activations(
    trained: PreTrainedModel, trained_calibration: Calibration, name: str
) -> None:
    """ŷ = (W' ) topk(x') with x' = Qᵀx where the residual stream is read and W' = QᵀW where it is written."""
    x = inputs_of(trained, trained_calibration, [name])[name]
    dense = trained.get_submodule(name)
    model = sparsify.convert(copy.deepcopy(trained), MODEL, trained_calibration)
    layer: Any = sparse_layers(model)[name]
    assert type(layer) is TopKLinear
    embedding, turned = (m.get_input_embeddings().weight.detach().double() for m in (trained, model))
    q = torch.linalg.lstsq(embedding, turned).solution
    torch.testing.assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype), rtol=0, atol=1e-4)
    few, k, weight = x[:8], int(layer.threshold), dense.weight.detach().double()
    if name == Q:
        g = trained.get_submodule("model.layers.0.input_layernorm").weight.detach().double()
        expected = top_k((few / g) @ q, k) @ ((weight * g) @ q).T
        found = layer(((few / g) @ q).float())
    elif name == O:
        # Its columns are turned by head, too: W' = QᵀWR, so W'W'ᵀ has no R in it.
        written = layer.weight.detach().double()
        inner = q.T @ weight
        torch.testing.assert_close(written @ written.T, inner @ inner.T, rtol=1e-3, atol=1e-3)
        expected = top_k(few, k) @ written.T
        found = layer(few.float())
    else:
        expected = top_k(few, k) @ weight.T @ q
        found = layer(few.float())
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [LAYER, MODEL], ids=["layer", "model"])
def test_the_split_is_the_papers_and_the_bytes_are_met(
    method: Larosa, trained: PreTrainedModel, trained_calibration: Calibration
) -> None:
    model = sparsify.convert(copy.deepcopy(trained), method, trained_calibration)
    ledger = sparsify.ledger_of(model)
    channel = sum(linear.dense_bytes / linear.inputs for linear in ledger.linears)
    assert 0 <= 0.5 * ledger.dense_bytes - ledger.touched_bytes < channel
    linears = {linear.name: linear for linear in ledger.linears}
    p = (1 - linears[Q].density) / 0.8
    for name, linear in linears.items():
        coefficient = 1.2 if "o_proj" in name or "down_proj" in name else 0.8
        # k is rounded down.
        assert 0 <= 1 - coefficient * p - linear.density + 1.5 / linears[Q].inputs < 3 / linears[Q].inputs
    rotations = sum(linear.rotation_bytes for linear in ledger.linears)
    assert rotations == pytest.approx(10 * 320 * 320 * 4 if method is LAYER else 0)


def test_every_channel_of_a_rotation_is_the_dense_layer(
    trained: PreTrainedModel, trained_calibration: Calibration, trained_inputs: dict[str, Tensor]
) -> None:
    model = sparsify.convert(copy.deepcopy(trained), LAYER, trained_calibration)
    layer, x = sparse_layers(model)[Q], trained_inputs[Q]
    layer.threshold.fill_(layer.sparse_in)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotation", ["layer", "model"])
def test_sparsity_0_is_the_dense_model(
    rotation: str, tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    dense = logits(tiny_llama, tiny_calibration.tokens)
    sparsify.convert(tiny_llama, Larosa(0.0, rotation=rotation), tiny_calibration)
    torch.testing.assert_close(logits(tiny_llama, tiny_calibration.tokens), dense, rtol=1e-3, atol=1e-3)


def test_one_rotation_is_stored_for_a_site(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, Larosa(0.3, rotation="layer"), tiny_calibration)
    stored = [name for name in tiny_llama.state_dict() if name.endswith(".rotation")]
    assert stored == [f"model.layers.{i}.{n}_proj.rotation" for i in (0, 1) for n in ("self_attn.q", "mlp.gate")]
    copied = copy.deepcopy(tiny_llama)
    tokens = tiny_calibration.tokens
    assert torch.equal(logits(copied, tokens), logits(tiny_llama, tokens))
    layers: Any = sparse_layers(copied)
    layers[Q].rotation.zero_()
    # k's rotation is the copy's q's, not the original's.
    assert float(layers[K](torch.randn(2, 64)).detach().abs().max()) == 0.0
    assert layers[Q].to(torch.bfloat16).rotation.dtype == torch.bfloat16


@pytest.mark.parametrize("rotation", ["layer", "model"])
def test_it_comes_back(
    rotation: str, tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path
) -> None:
    tokens, dense = tiny_calibration.tokens, logits(tiny_llama, tiny_calibration.tokens)
    sparsify.convert(tiny_llama, Larosa(0.3, rotation=rotation), tiny_calibration)
    folder = sparsify.save(tiny_llama, tmp_path / "saved")
    again = sparsify.load(folder)
    before, after = tiny_llama.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(again, tokens), logits(tiny_llama, tokens))
    assert sparsify.verify(folder) == []
    plain = logits(sparsify.load(folder, dense=True), tokens)
    if rotation == "layer":
        assert torch.equal(plain, dense)
    torch.testing.assert_close(plain, dense, rtol=1e-3, atol=1e-3)
    config = again.config.quantization_config
    assert config.rotated == (rotation == "model")
    assert ("the dense weights were rotated" in (folder / "README.md").read_text()) == config.rotated
    with RealisedDensity(again) as realised:
        logits(again, tokens)
    assert realised.densities() == {name: entry.density for name, entry in config.linears.items()}


@pytest.fixture(scope="module")
def saved(
    _tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """tiny_llama by the layer form, saved; to be read only."""
    model = sparsify.convert(copy.deepcopy(_tiny_llama), Larosa(0.3, rotation="layer"), tiny_calibration)
    return sparsify.save(model, tmp_path_factory.mktemp("larosa") / "saved")


def _rotation(change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(f"{Q}.rotation"))
        if changed is not None:
            tensors[f"{Q}.rotation"] = changed.contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def _extra(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{K}.rotation"] = torch.eye(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _entry(name: str, key: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["linears"][name][key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return apply


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_rotation(lambda q: None), "no '.*q_proj.rotation'"),
    "NaN": (_rotation(lambda q: q.fill_(float("nan"))), "rotation holds values that are not finite"),
    "zeros": (_rotation(torch.zeros_like), "q_proj.rotation is not orthogonal"),
    "one value": (_rotation(lambda q: q.index_fill(0, torch.tensor([3]), 0.5)), "q_proj.rotation is not orthogonal"),
    "of another shape": (_rotation(lambda q: q[:-1]), "q_proj.rotation has the shape"),
    "a second one": (_extra, "'.*k_proj.rotation', which its quantization_config does not name"),
    "of another site": (_entry(K, "rotation", "model.layers.0.mlp.gate_proj"), "not a linear of its site that has one"),
    "of a linear that has none": (_entry(K, "rotation", K), "no '.*k_proj.rotation'"),
    "of nothing": (_entry(K, "rotation", "nothing"), "rotation is 'nothing'"),
    "with another cut": (_entry(K, "cut", "mean-std"), "it has a rotation, but not the cut 'top-k'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_are_one_clear_error(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[case]
    folder = Path(shutil.copytree(saved, tmp_path / "checkpoint"))
    change(folder)
    with pytest.raises(CheckpointError, match=message) as refusal:
        sparsify.load(folder)
    assert "\n" not in str(refusal.value)
    assert any("rotation" in problem for problem in sparsify.verify(folder))


def test_fused_linears_and_conv1d_take_the_layer_form(tiny_calibration: Calibration) -> None:
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    sparsify.convert(model, Larosa(0.4, rotation="layer"), tiny_calibration)
    kinds = {name.rpartition("0.")[2]: type(layer) for name, layer in sparse_layers(model).items()}
    assert [name for name, kind in kinds.items() if kind is RotatedTopKConv1D] == ["attn.c_attn", "mlp.c_fc"]


def test_refusals(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with pytest.raises(SparsifyError, match=r"rotations, thresholds and one channel.*or rotation 'model'"):
        sparsify.convert(copy.deepcopy(tiny_llama), Larosa(0.9, rotation="layer"), tiny_calibration)
    with pytest.raises(SparsifyError, match="larosa cuts each token by itself"):
        sparsify.convert(copy.deepcopy(tiny_llama), MODEL, tiny_calibration, allocation="sensitivity")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=128, **size)).eval()
    with pytest.raises(SparsifyError, match=r"GPTNeoXForCausalLM is not one of .*use larosa with rotation='layer'"):
        sparsify.convert(other, MODEL, tiny_calibration)
    assert not sparse_layers(other)
    with pytest.raises(SparsifyError, match=r"unknown rotation 'modell'.*Did you mean 'model'"):
        Larosa(0.5, rotation="modell")
    assert parse_method("larosa:rotation=layer", 0.4) == Larosa(0.4, rotation="layer")
