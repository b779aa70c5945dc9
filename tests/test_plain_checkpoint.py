"""Dense checkpoints of ReLU-fied models: what config.json says of FATReLU for vLLM, and where it cannot say it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import sparsify
from sparsify import SparsifyError
from sparsify.plain_checkpoint import check_plain, save_plain
from sparsify.relufication import Relufication, check_relufiable, relufy

_SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 32,
}  # fmt: skip
_FAT = Relufication("fatrelu", cut=0.25)


@pytest.mark.parametrize(
    ("model", "vllm"),
    [
        (LlamaForCausalLM(LlamaConfig(**_SIZES)), True),
        (LlamaForCausalLM(LlamaConfig(**_SIZES, attention_bias=True)), False),
        (LlamaForCausalLM(LlamaConfig(**_SIZES, head_dim=4)), False),
        (Qwen2ForCausalLM(Qwen2Config(**_SIZES)), False),
    ],
    ids=["llama", "bias", "head-dim", "qwen2"],
)
def test_fatrelu_is_a_minicpm_only_where_that_is_the_same_model(
    model: Any, vllm: bool, tiny_dense: Path, tmp_path: Path
) -> None:
    model = model.eval()
    check_plain(model, _FAT, check_relufiable(model, _FAT))
    relufy(model, _FAT)
    out = tmp_path / "fat"
    save_plain(model, out, sparsify.load_tokenizer(str(tiny_dense)), how=_FAT, source="a", said="b")
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_act"], config["hidden_act_param"]) == ("fatrelu", 0.25)
    assert config["architectures"] == (["MiniCPMForCausalLM"] if vllm else [type(model).__name__])
    card = (out / "README.md").read_text()
    assert ("vLLM loads it as MiniCPMForCausalLM" in card) is vllm
    assert sparsify.load_dense(str(out)).get_submodule("model.layers.0.mlp.act_fn").cut == 0.25


def test_where_no_module_reads_the_number_it_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=32)).eval()
    with pytest.raises(SparsifyError, match=r"GPT2MLP of GPT2LMHeadModel does not read that: leave --plain out"):
        check_plain(model, _FAT, check_relufiable(model, _FAT))
    check_plain(model, Relufication("relu"), check_relufiable(model, "relu"))
