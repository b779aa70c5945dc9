"""llama.cpp beside us: the files hold the same model, and every side is measured. No timing is asserted."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals import llama_cpp, shapes, stream
from sparsify.evals.llama_cpp import FORMATS, Settings, compare, gguf_bytes_per_token, main, rope_pairs, write_gguf
from sparsify.evals.shapes import random_model, random_tokens

_SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 5000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
_MODELS = {
    "llama": (LlamaConfig, {**_SMALL, "tie_word_embeddings": False}),
    "llama-tied": (LlamaConfig, {**_SMALL, "tie_word_embeddings": True}),
    # Heads that are wider than hidden size / heads.
    "llama-wide": (LlamaConfig, {**_SMALL, "head_dim": 32, "attention_bias": True, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {**_SMALL, "tie_word_embeddings": True}),
}
_SETTINGS = Settings("llama", sparsities=(0.0, 0.5), threads=1, context=20, new_tokens=3, rounds=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in _MODELS.items():
        monkeypatch.setitem(shapes.SHAPES, name, shape)
    monkeypatch.setattr(stream, "_LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(stream, "cache_of", lambda device: None)


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")


@pytest.fixture
def llama(gguf: Any) -> Any:
    reason = "llama-cpp-python is not installed: pip install 'sparsify-llm[compare]'"
    return pytest.importorskip("llama_cpp", reason=reason)


def _tensors(gguf: Any, path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _values(gguf: Any, tensor: Any) -> torch.Tensor:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    # GGUF writes the innermost dimension first.
    return torch.from_numpy(np.array(values)).reshape(*reversed(tensor.shape.tolist()))


def test_permuted_rows_turn_in_pairs_as_they_turned_in_halves() -> None:
    heads, width = 3, 8
    x = torch.randn(heads * width)
    angles = torch.rand(width // 2)
    halves, _ = apply_rotary_pos_emb(
        x.view(1, heads, 1, width), x.view(1, heads, 1, width),
        torch.cat([angles, angles]).cos().view(1, 1, -1), torch.cat([angles, angles]).sin().view(1, 1, -1),
    )  # fmt: skip
    even, odd = rope_pairs(x, heads).view(heads, -1, 2).unbind(-1)
    pairs = torch.stack([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1)
    torch.testing.assert_close(pairs.reshape(-1), rope_pairs(halves.reshape(-1), heads))


@pytest.mark.parametrize("name", _MODELS)
def test_files_hold_the_model(gguf: Any, name: str, tmp_path: Path) -> None:
    model = random_model(name)
    write_gguf(model, tmp_path / "model.gguf", "BF16")
    found = _tensors(gguf, tmp_path / "model.gguf")
    assert ("output.weight" in found) == (not model.config.tie_word_embeddings)
    assert len(found) == len(list(model.parameters()))
    block = model.model.layers[1]
    for own, kind, heads in (("q_proj", "q", 4), ("k_proj", "k", 2), ("v_proj", "v", 0)):
        linear = getattr(block.self_attn, own)
        for part in ("weight", "bias") if linear.bias is not None else ("weight",):
            tensor = getattr(linear, part).float()
            expected = rope_pairs(tensor, heads) if heads and name != "qwen2" else tensor
            # bf16 weights in BF16, biases in F32: nothing is rounded.
            assert torch.equal(_values(gguf, found[f"blk.1.attn_{kind}.{part}"]), expected)
    for theirs, module in (("ffn_down", block.mlp.down_proj), ("ffn_norm", block.post_attention_layernorm)):
        assert torch.equal(_values(gguf, found[f"blk.1.{theirs}.weight"]), module.weight.float())
    assert list(tmp_path.iterdir()) == [tmp_path / "model.gguf"]


@pytest.mark.parametrize("quantisation", FORMATS)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_bytes_are_those_of_the_file(gguf: Any, name: str, quantisation: str, tmp_path: Path) -> None:
    model = random_model(name)
    write_gguf(model, tmp_path / "model.gguf", quantisation)
    found = _tensors(gguf, tmp_path / "model.gguf")
    held = sum(tensor.n_bytes for tensor in found.values())
    embedding = 0 if model.config.tie_word_embeddings else found["token_embd.weight"].n_bytes
    assert gguf_bytes_per_token(model, quantisation) == held - embedding + embedding // 320
    # Largest errors: half a step of 127, one of 8 (its largest weight decides the sign), half a unit of 11 or 8 bits.
    off = (_values(gguf, found["blk.0.ffn_up.weight"]) - model.model.layers[0].mlp.up_proj.weight.float()).abs().max()
    largest = model.model.layers[0].mlp.up_proj.weight.float().abs().max()
    assert off <= {"Q8_0": 0.51 / 127, "Q4_0": 1.01 / 8, "F16": 2**-12, "BF16": 0}[quantisation] * largest


def test_what_cannot_be_written_is_refused(gguf: Any, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match=r"unknown format 'Q8'.*Did you mean 'Q8_0'\?"):
        write_gguf(tiny_llama, tmp_path / "x", "Q8")
    tiny_llama.config.rope_parameters["rope_type"] = "llama3"
    with pytest.raises(SparsifyError, match="rope scaling 'llama3'"):
        write_gguf(tiny_llama, tmp_path / "x", "F16")
    tiny_llama.config.model_type = "gpt2"
    with pytest.raises(SparsifyError, match="a gpt2 is not written as GGUF here: llama and qwen2 are"):
        write_gguf(tiny_llama, tmp_path / "x", "F16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", _MODELS)
def test_llama_cpp_computes_the_same_model(llama: Any, name: str, tmp_path: Path) -> None:
    model = random_model(name, dtype=torch.float32)
    write_gguf(model, tmp_path / "model.gguf", "F16")
    tokens = random_tokens(model, 1, 24)
    with torch.inference_mode():
        expected = model(tokens).logits[0, -1]
    other = llama_cpp._LlamaCpp(tmp_path / "model.gguf", positions=24)
    try:
        found = other.decode(tokens[0].tolist(), 20)
        # The cache of the first time does not matter.
        again = other.decode(tokens[0].tolist(), 10)
    finally:
        other.close()
    assert len(found.seconds) == 4
    # fp16 weights and cache: 2^-11 a product, over a few blocks.
    assert torch.cosine_similarity(found.logits, expected, dim=0) > 0.99999
    assert torch.cosine_similarity(again.logits, expected, dim=0) > 0.99999


def test_all_sides_are_measured(llama: Any, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    result = compare(_SETTINGS, folder=tmp_path)
    assert torch.get_num_threads() == threads
    assert {"sparse-0", "sparse-50", "dense", "transformers", *(f"llama.cpp {f}" for f in FORMATS)} <= set(result.sides)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"llama-seed0-{f}.gguf" for f in FORMATS)
    for name, side in result.sides.items():
        assert len(side.ms_by_round) == 2
        assert 0 < side.ms_per_token.p10 <= side.ms_per_token.median <= side.ms_per_token.p90
        assert side.gb_per_second == pytest.approx(side.bytes_per_token / side.ms_per_token.median / 1e6)
        assert set(result.ratios[name]) >= set(result.sides) - {name}
        assert (side.cosine is None) == (name == "sparse-50")
        assert (side.realised_sparsity is None) == (not name.startswith("sparse"))
    sides = result.sides
    assert sides["sparse-0"].realised_sparsity == 0
    assert 0.35 < (sides["sparse-50"].realised_sparsity or 0) < 0.65
    assert sides["dense"].bytes_per_token == sides["transformers"].bytes_per_token
    assert sides["sparse-0"].bytes_per_token == sides["dense"].bytes_per_token
    assert sides["sparse-50"].bytes_per_token < sides["dense"].bytes_per_token
    # Norms are in F32 there, all else has the same size.
    assert sides["llama.cpp F16"].bytes_per_token - sides["dense"].bytes_per_token == 7 * 64 * 2
    assert result.environment["threads"] == 1


def test_another_model_is_not_timed(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "rope_pairs", lambda weight, heads: weight)
    settings = Settings("llama", (0.5,), ("F16",), 1, 20, 3, 2)
    with pytest.raises(SparsifyError, match=r"llama-seed0-F16.gguf computes another model.*nothing was timed"):
        compare(settings, folder=tmp_path)


def test_the_command_writes_a_table_and_a_file(llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, save = tmp_path / "files", tmp_path / "results" / "llama.json"
    command = [
        "--shape", "qwen2", "--sparsities", "0.5", "0.5", "--formats", "F16", "Q8_0", "--threads", "1",
        "--context", "4", "--new-tokens", "2", "--rounds", "1", "--folder", str(folder), "--save", str(save),
    ]  # fmt: skip
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "| sparse-50 |" in table
    assert "| llama.cpp Q8_0 |" in table
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    data = json.loads(save.read_text())
    assert data["settings"]["shape"] == "qwen2"
    assert data["sides"]["llama.cpp F16"]["cosine"] > 0.995
    assert data["environment"]["versions"]["llama-cpp-python"]
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": "lama"}, r"unknown shape 'lama'.*Did you mean 'llama'\?"),
        ({"formats": ("Q4",)}, r"unknown format 'Q4'.*Did you mean 'Q4_0'\?"),
        ({"sparsities": (50.0,)}, r"Did you mean 0.5\?"),
        ({"new_tokens": 0}, "new tokens must be at least 1, not 0"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"context": 200}, "207 tokens are more than this model's 128 positions"),
    ],
)
def test_bad_settings_are_refused(llama: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        compare(Settings(**{"shape": "llama", "new_tokens": 3, **changed}))


@pytest.mark.parametrize("package", ["llama_cpp", "gguf"])
def test_a_missing_package_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"llama_cpp", "gguf"} - {package}
    monkeypatch.setitem(sys.modules, package, None)
    for name in other:
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    with pytest.raises(UnavailableError, match=rf"{package} is not installed: `pip install 'sparsify-llm\[compare\]'`"):
        compare(_SETTINGS)
    assert main(["--shape", "llama"]) == 4
