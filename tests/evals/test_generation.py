"""Side-by-side generation: the dense side is the dense model, the sparse side the converted one."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify.errors import SparsifyError
from sparsify.evals.generation import agreement, side_by_side
from sparsify.linear import SparsitySwitch, make_sparse

_WORDS = [f"w{i}" for i in range(40)]


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


def _model(threshold: float | None) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if threshold is not None:
        switch = SparsitySwitch()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                layer = make_sparse(module, scaled=False, rank=0, switch=switch)
                layer.threshold.fill_(threshold)
                model.set_submodule(name, layer)
    return model


def test_agreement_counts_to_the_first_difference() -> None:
    assert agreement([1, 2, 3], [1, 2, 4]) == 2
    assert agreement([1, 2, 3], [1, 2]) == 2
    assert agreement([5], [6]) == 0
    assert agreement([], [1]) == 0


def test_a_model_that_keeps_everything_writes_the_same() -> None:
    written = side_by_side(_model(-1.0), _tokenizer(), "w1 w2 w3", max_new_tokens=10)
    assert written.sparse is not None
    assert written.prompt_tokens == 3
    assert written.dense.tokens == written.sparse.tokens
    assert written.agreement == len(written.dense.tokens) == 10
    # w0 is the unknown token, a special one, and is left out of the text.
    assert written.dense.text.split() == [f"w{i}" for i in written.dense.tokens if i]
    assert written.dense.tokens_per_second > 0


def test_sides_are_the_dense_and_the_sparse_model() -> None:
    alone = side_by_side(_model(None), _tokenizer(), "w1 w2", max_new_tokens=12)
    assert alone.sparse is None
    assert alone.agreement is None
    both = side_by_side(_model(2.0), _tokenizer(), "w1 w2", max_new_tokens=12)
    assert both.sparse is not None
    assert both.dense.tokens == alone.dense.tokens
    assert both.sparse.tokens != both.dense.tokens
    assert json.loads(json.dumps(both.to_dict()))["sparse"]["tokens_per_second"] > 0
    assert alone.to_dict()["sparse"] is None


def test_sampling_is_by_seed_and_leaves_the_random_state_alone() -> None:
    model, tokenizer = _model(-1.0), _tokenizer()
    before = torch.random.get_rng_state()
    first = side_by_side(model, tokenizer, "w1", max_new_tokens=8, temperature=1.0, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    again = side_by_side(model, tokenizer, "w1", max_new_tokens=8, temperature=1.0, seed=4)
    other = side_by_side(model, tokenizer, "w1", max_new_tokens=8, temperature=1.0, seed=5)
    assert first.sparse is not None
    assert first.dense.tokens == again.dense.tokens == first.sparse.tokens
    assert other.dense.tokens != first.dense.tokens


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "prompt holds no tokens"),
        ("w1", {"max_new_tokens": 0}, "at least 1"),
        ("w1", {"max_new_tokens": 32}, "33 tokens are more than this model's 32 positions"),
        ("w1", {"temperature": -1.0}, "temperature must be 0"),
        ("w1", {"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_bad_input_is_refused(prompt: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        side_by_side(_model(-1.0), _tokenizer(), prompt, **settings)  # type: ignore[arg-type]
