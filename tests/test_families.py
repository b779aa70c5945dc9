"""Every family that the README names, as a tiny random model: its sites, exactness at sparsity 0, and round trips.

The kernels have tests of their own; here a family is converted, saved and loaded like any other, with nothing
written for it.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsify
from sparsify.linear import SparseConv1D
from sparsify.mlp_targets import find_mlps
from sparsify.runtime import sparse_layers
from sparsify.targets import find_targets, linear_shapes

VOCABULARY = 128
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {**BASE, "intermediate_size": 96, "num_key_value_heads": 2}
GEMMA = {**GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
VISION = {
    "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"image_size": 28, "patch_size": 14},
    "mm_tokens_per_image": 4,
    "image_token_index": 127,
    "boi_token_index": 126,
    "eoi_token_index": 125,
}
EXPERTS = {**GQA, "head_dim": 16, "num_experts_per_tok": 2}

ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
GATED = (*ATTENTION, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


@dataclass(frozen=True)
class Family:
    """A configuration and, as they stand in a block, the groups of linears that must share an input site."""

    config: str
    options: dict[str, Any]
    blocks: str
    groups: tuple[tuple[str, ...], ...]
    exact: bool = True


FAMILIES = {
    "llama": Family("LlamaConfig", GQA, "model.layers", GATED),
    "llama-tied": Family("LlamaConfig", {**GQA, "tie_word_embeddings": True}, "model.layers", GATED),
    "mistral": Family("MistralConfig", {**GQA, "sliding_window": 16}, "model.layers", GATED),
    "qwen2": Family("Qwen2Config", GQA, "model.layers", GATED),
    "qwen3": Family("Qwen3Config", {**GQA, "head_dim": 16}, "model.layers", GATED),
    "gemma2": Family("Gemma2Config", GEMMA, "model.layers", GATED),
    "gemma3": Family("Gemma3TextConfig", GEMMA, "model.layers", GATED),
    # As deep a vision tower, and other names on the disk than in memory.
    "gemma3-vision": Family("Gemma3Config", {"text_config": GEMMA, **VISION}, "model.language_model.layers", GATED),
    "phi3": Family(
        "Phi3Config",
        GQA,
        "model.layers",
        (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    ),
    "opt": Family(
        "OPTConfig",
        {**BASE, "ffn_dim": 96, "word_embed_proj_dim": 64},
        "model.decoder.layers",
        (ATTENTION[0], ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    ),
    "gpt-neox": Family(
        "GPTNeoXConfig",
        {**BASE, "intermediate_size": 96},
        "gpt_neox.layers",
        (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
    ),
    "gpt2": Family(
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "transformer.h",
        (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        exact=False,
    ),
    "gpt-neo": Family(
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16}
        | {key: value for key, value in BASE.items() if not key.startswith("num_")}
        | {"intermediate_size": 96},
        "transformer.h",
        (
            ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            ("attn.attention.out_proj",),
            ("mlp.c_fc",),
            ("mlp.c_proj",),
        ),
    ),
    "olmo2": Family("Olmo2Config", GQA, "model.layers", GATED),
    "mixtral": Family("MixtralConfig", {**EXPERTS, "num_local_experts": 4}, "model.layers", ATTENTION),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
        "model.layers",
        ATTENTION,
    ),
}
MOE = ("mixtral", "qwen3-moe")
METHODS = {
    "teal": sparsify.Teal(sparsity=0.5),
    "wina": sparsify.Wina(sparsity=0.5),
    "rsparse": sparsify.RSparse(sparsity=0.5, rho=0.8),
}


@dataclass(frozen=True)
class Dense:
    """A dense model of one family, a left-padded batch, and the model's logits on it."""

    family: Family
    model: PreTrainedModel
    batch: dict[str, Tensor]
    calibration: sparsify.Calibration
    logits: Tensor


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest) -> Dense:
    family = FAMILIES[request.param]
    generator = torch.Generator().manual_seed(1)
    config = getattr(transformers, family.config)(**family.options)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # Wide enough to matter, biases and norms away from 0 and 1: what is dropped must show in the logits.
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise) if parameter.dim() > 1 else parameter.add_(0.1 * noise)
    ids = torch.randint(3, 120, (2, 12), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calibration = sparsify.Calibration(torch.randint(3, 120, (4, 24), generator=generator), "random")
    return Dense(family, model, batch, calibration, logits(model, batch))


@torch.no_grad()
def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**batch).logits
    return output


def converted(dense: Dense, method: Any) -> PreTrainedModel:
    return sparsify.convert(copy.deepcopy(dense.model), method, dense.calibration)


def test_sites_are_found_by_structure_and_sparsity_zero_is_dense(dense: Dense) -> None:
    model = converted(dense, sparsify.RSparse(sparsity=0.0))
    expected = [
        tuple(f"{dense.family.blocks}.{block}.{name}" for name in group)
        for block in range(2)
        for group in dense.family.groups
    ]
    assert [tuple(site) for site in model.config.quantization_config.sites] == expected
    assert set(sparse_layers(model)) == {name for group in expected for name in group}
    found = logits(model, dense.batch)
    if dense.family.exact:
        assert torch.equal(found, dense.logits)
    else:
        # Conv1D is addmm on a flattened input, the sparse layer a linear: another order of summation in fp32.
        torch.testing.assert_close(found, dense.logits, rtol=1e-5, atol=1e-5)
    ledger = sparsify.ledger_of(model)
    assert ledger.touched_bytes == ledger.dense_bytes
    assert ledger.weighted_sparsity == 0.0


def test_a_model_without_weights_has_the_same_sites_and_mlps(dense: Dense) -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(dense.model.config)).eval()
    tokens = dense.batch["input_ids"][:1]
    targets = find_targets(dense.model, tokens)
    assert find_targets(empty, tokens) == targets
    assert linear_shapes(empty, targets) == linear_shapes(dense.model, targets)
    assert find_mlps(empty, targets, tokens) == find_mlps(dense.model, targets, tokens)
    assert not any("forward" in vars(module) for module in empty.modules())


@pytest.mark.parametrize("name", METHODS)
def test_convert_save_load_generate(dense: Dense, name: str, tmp_path: Path) -> None:
    model = converted(dense, METHODS[name])
    ranks = [layer.rank for layer in sparse_layers(model).values()]
    assert all(ranks) if name == "rsparse" else not any(ranks)
    sparse = logits(model, dense.batch)
    assert sparse.isfinite().all()
    assert not torch.allclose(sparse, dense.logits, rtol=0.01, atol=0.01), "nothing was dropped"
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    generated = model.generate(**dense.batch, **greedy)

    folder = sparsify.save(model, tmp_path / "sparse")
    assert sparsify.verify(folder) == []
    loaded = sparsify.load(folder)
    assert torch.equal(logits(loaded, dense.batch), sparse)
    assert torch.equal(loaded.generate(**dense.batch, **greedy), generated)
    ledger = sparsify.ledger_of(loaded)
    assert ledger == sparsify.ledger_of(model)
    for linear in ledger.linears:
        assert linear.touched_bytes == pytest.approx(0.5 * linear.dense_bytes)
    assert 0.0 < ledger.model_sparsity < ledger.weighted_sparsity == pytest.approx(0.5)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(plain, dense.batch), sparse)
    as_dense = sparsify.load(folder, dense=True)
    assert not sparse_layers(as_dense)
    assert torch.equal(logits(as_dense, dense.batch), dense.logits)


@pytest.mark.parametrize("dense", MOE, indirect=True)
def test_experts_stay_dense_and_it_says_so(dense: Dense) -> None:
    model = converted(dense, METHODS["rsparse"])
    (statement,) = model.config.quantization_config.left_dense
    assert "4 expert weights" in statement
    assert "left dense" in statement
    assert "mlp.experts" in statement
    before = dict(dense.model.named_parameters())
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    unconverted = [name for name in before if ".mlp." in name]
    assert any("gate.weight" in name for name in unconverted), "the router is one of them"
    for name in unconverted:
        assert torch.equal(after[name], before[name])
    experts = [tensor for tensor in after.values() if tensor.dim() == 3]
    others = [tensor for name, tensor in after.items() if tensor.dim() != 3 and "_proj" not in name]
    embedding = before["model.embed_tokens.weight"]
    # Two of four experts are visited by a token, and one row of the embedding.
    visited = sum(tensor.numel() for tensor in experts) * 4 // 2
    expected = visited + sum(tensor.numel() for tensor in others) * 4 - embedding.numel() * 4 + embedding[0].numel() * 4
    assert sparsify.ledger_of(model).rest_bytes == expected


@pytest.mark.parametrize("dense", ["gpt2"], indirect=True)
def test_conv1d_keeps_its_layout(dense: Dense, tmp_path: Path) -> None:
    model = converted(dense, METHODS["rsparse"])
    layers = sparse_layers(model)
    assert all(isinstance(layer, SparseConv1D) for layer in layers.values())
    layer = layers["transformer.h.0.attn.c_attn"]
    assert tuple(layer.weight.shape) == (64, 192)
    assert tuple(layer.tensors().weight.shape) == (192, 64)
    assert layer.lr_a is not None
    assert layer.lr_a.shape[1] == 64


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_round_trip_keeps_thresholds_in_fp32(dense: Dense, name: str, tmp_path: Path) -> None:
    dense.model.save_pretrained(tmp_path / "dense")
    # Not .bfloat16(), which would round the rotary frequencies, as no load does.
    model = sparsify.load_dense(str(tmp_path / "dense"), dtype="bfloat16")
    expected_dense = logits(model, dense.batch)
    sparsify.convert(model, METHODS[name], dense.calibration)
    expected = logits(model, dense.batch)
    folder = sparsify.save(model, tmp_path / "sparse")
    assert sparsify.verify(folder) == []
    loaded = sparsify.load(folder)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, dense.batch), expected)
    assert torch.equal(logits(sparsify.load(folder, dense=True), dense.batch), expected_dense)


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
@pytest.mark.parametrize("cast", ["load", "to", "half", "double", "bfloat16"])
def test_casts_do_not_round_thresholds_and_scales(dense: Dense, cast: str, tmp_path: Path) -> None:
    model = converted(dense, METHODS["rsparse"])
    layers = sparse_layers(model)
    before = {name: (layer.threshold.clone(), layer.scale.clone()) for name, layer in layers.items()}
    rounded = [threshold for threshold, _ in before.values() if threshold.bfloat16().float() != threshold]
    assert rounded, "a bfloat16 copy would differ"
    if cast == "load":
        model = sparsify.load(sparsify.save(model, tmp_path / "sparse"), dtype="bfloat16")
    elif cast == "to":
        model = model.to(torch.bfloat16)
    else:
        # On the decoder: transformers refuses casts by name of the whole of any model that has a quantizer.
        getattr(model.model, cast)()
    for name, layer in sparse_layers(model).items():
        threshold, scale = before[name]
        assert layer.threshold.dtype == layer.scale.dtype == torch.float32
        assert torch.equal(layer.threshold, threshold)
        assert torch.equal(layer.scale, scale)
        assert layer.weight.dtype == layer.lr_a.dtype == layer.lr_b.dtype != torch.float32


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
def test_grouped_query_attention_has_budgets_of_its_own_shapes(dense: Dense) -> None:
    entries = converted(dense, METHODS["rsparse"]).config.quantization_config.linears
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "down_proj": (64, 96)}
    for name, (outputs, inputs) in shapes.items():
        path = f"model.layers.0.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}"
        channels = math.floor(inputs * 0.5 * 0.8)
        assert entries[path].rank == math.floor((inputs * outputs * 0.5 - channels * outputs) / (inputs + outputs))


def test_a_convolution_is_not_called_an_expert() -> None:
    config = transformers.Lfm2Config(**GQA, layer_types=["conv", "full_attention"])
    model = AutoModelForCausalLM.from_config(config).eval()
    sparsify.convert(model, METHODS["teal"], sparsify.Calibration(torch.randint(3, 120, (2, 16)), "random"))
    config = model.config.quantization_config
    assert config.left_dense == []
    assert config.sites[0] == ["model.layers.0.conv.in_proj"]
    kernel = model.model.layers[0].conv.conv.weight
    assert kernel.dim() == 3
    with_kernel = sparsify.ledger_of(model).rest_bytes
    kernel.data = kernel.data[:, :, :1]
    assert sparsify.ledger_of(model).rest_bytes == with_kernel - 64 * 2 * 4


@pytest.mark.parametrize("dense", ["gemma3-vision"], indirect=True)
def test_a_vision_tower_stays_out_of_the_ledger(dense: Dense) -> None:
    model = converted(dense, METHODS["teal"])
    decoder = model.model.language_model
    linears = sum(layer.weight.numel() for layer in sparse_layers(model).values())
    embedding = decoder.embed_tokens.weight
    # The tied head is read whole.
    expected = 4 * (sum(parameter.numel() for parameter in decoder.parameters()) - linears)
    assert model.get_output_embeddings().weight is embedding
    assert sparsify.ledger_of(model).rest_bytes == expected


def test_block_by_block_it_is_the_same_checkpoint(dense: Dense, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    family = request.node.callspec.params["dense"]
    dense.model.save_pretrained(tmp_path / "dense")
    method = METHODS["wina"]
    if family in MOE:
        with pytest.raises(sparsify.SparsifyError, match="experts transformers merges"):
            sparsify.convert_streamed(str(tmp_path / "dense"), tmp_path / "out", method, dense.calibration)
        return
    sparsify.convert_streamed(str(tmp_path / "dense"), tmp_path / "streamed", method, dense.calibration)
    model = sparsify.load_dense(str(tmp_path / "dense"))
    sparsify.save(sparsify.convert(model, method, dense.calibration), tmp_path / "whole")
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("streamed", "whole")
    }
    assert files["streamed"] == files["whole"]
