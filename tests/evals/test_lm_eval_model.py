"""lm-eval's model type `sparsify` against lm-eval's own `hf` and against plain loops, on a tiny random Llama."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import sparsify
from sparsify.errors import SparsifyError
from sparsify.evals.realised import RealisedDensity
from sparsify.native_decode import native_forward_of
from sparsify.runtime import switch_of

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'sparsify-llm[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sparsify.evals.lm_eval_model import SparsifyLM

# Of several lengths, with one context for two continuations, one of one token, and an empty context.
_PAIRS = [
    ("def mean(values):", " return sum"),
    ("def mean(values):", " pass"),
    ("import", " os, sys"),
    ("x = 1", "\n"),
    ("y = 2", "\n"),
    ("", "class Line:"),
]
_SETTINGS = {"until": ["zz"], "max_gen_toks": 8, "do_sample": False}


def _model(folder: Path, dtype: str = "float32") -> Any:
    return sparsify.load(folder, dtype=dtype)


def _evaluated(model: Any, folder: Path, **options: Any) -> SparsifyLM:
    return SparsifyLM(model, tokenizer=sparsify.load_tokenizer(str(folder)), **options)


def _asked(kind: str, arguments: list[Any], task: str = "task") -> list[Any]:
    return [Instance(kind, {}, given, index, metadata=(task, index, 1)) for index, given in enumerate(arguments)]


def _scores(evaluated: Any, task: str = "task") -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = evaluated.loglikelihood(_asked("loglikelihood", _PAIRS, task), disable_tqdm=True)
    return found


def _log_probabilities(logits: Tensor, tokens: list[int]) -> float:
    chosen = torch.log_softmax(logits.float(), -1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    return float(chosen.sum())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_request_at_a_time_scores_as_hf_does(tiny_sparse: Path, dtype: str) -> None:
    model = _model(tiny_sparse, dtype)
    ours = _evaluated(model, tiny_sparse)
    theirs = HFLM(pretrained=model, tokenizer=sparsify.load_tokenizer(str(tiny_sparse)), batch_size=1)
    assert _scores(ours) == _scores(theirs)
    rolling = _asked("loglikelihood_rolling", [("def mean(values):\n    pass",), ("x" * 600,)])
    assert ours.loglikelihood_rolling(rolling) == theirs.loglikelihood_rolling(rolling)
    prompts = _asked("generate_until", [(text, _SETTINGS) for text in ("def mean", "import", "x = 10")])
    assert ours.generate_until(prompts, disable_tqdm=True) == theirs.generate_until(prompts, disable_tqdm=True)


@torch.no_grad()
def test_decode_is_a_dense_prompt_and_then_sparse_steps_of_one_token(tiny_sparse: Path) -> None:
    model = _model(tiny_sparse)
    evaluated = _evaluated(model, tiny_sparse, protocol="decode", batch_size=4)
    expected = []
    for pair in _PAIRS:
        if pair[0]:
            context, continuation = evaluated._encode_pair(*pair)
        else:
            context, continuation = [evaluated.prefix_token_id], evaluated.tok_encode(pair[1])
        cache = DynamicCache(config=model.config)
        if len(context) > 1:
            with sparsify.dense(model):
                model(input_ids=torch.tensor([context[:-1]]), past_key_values=cache, use_cache=True)
        steps = [context[-1], *continuation[:-1]]
        logits = [model(input_ids=torch.tensor([[s]]), past_key_values=cache, use_cache=True).logits[0] for s in steps]
        expected.append(_log_probabilities(torch.cat(logits), continuation))
    found = [score for score, _ in _scores(evaluated)]
    # fp32 sums in another order.
    assert found == pytest.approx(expected, rel=1e-4)
    every = [score for score, _ in _scores(_evaluated(model, tiny_sparse))]
    assert all(abs(a - b) > 1e-4 for a, b in zip(found[:4], every, strict=False))
    # No context, nothing to run dense.
    assert found[5] == pytest.approx(every[5], rel=1e-4)


@pytest.mark.parametrize("protocol", ["every-token", "decode"])
def test_the_dense_side_is_the_dense_model_in_either_protocol(
    tiny_sparse: Path, tiny_dense: Path, protocol: str
) -> None:
    model = _model(tiny_sparse)
    with sparsify.dense(model):
        evaluated = _evaluated(model, tiny_sparse, protocol=protocol, batch_size=2)
        found = [score for score, _ in _scores(evaluated)]
    plain = _evaluated(sparsify.load_dense(str(tiny_dense), dtype="float32"), tiny_dense, protocol=protocol)
    assert found == pytest.approx([score for score, _ in _scores(plain)], rel=1e-4)
    assert evaluated.realised["task"].tokens == 0


@pytest.mark.parametrize("protocol", ["every-token", "decode"])
def test_batches_change_nothing_and_hold_no_padding(tiny_sparse: Path, protocol: str) -> None:
    model = _model(tiny_sparse)
    one = _evaluated(model, tiny_sparse, protocol=protocol)
    many = _evaluated(model, tiny_sparse, protocol=protocol, batch_size=8)
    assert [score for score, _ in _scores(many)] == pytest.approx([score for score, _ in _scores(one)], rel=1e-4)
    assert many.realised["task"].tokens == one.realised["task"].tokens
    assert many.realised["task"].densities() == pytest.approx(one.realised["task"].densities(), abs=1e-3)


@torch.no_grad()
def test_densities_are_those_of_the_tokens_fed_by_task(tiny_sparse: Path) -> None:
    model = _model(tiny_sparse)
    evaluated = _evaluated(model, tiny_sparse, batch_size=4)
    asked = _asked("loglikelihood", _PAIRS[:3], "one") + _asked("loglikelihood", _PAIRS[3:5], "two")
    evaluated.loglikelihood(asked, disable_tqdm=True)
    for task, pairs in (("one", _PAIRS[:3]), ("two", _PAIRS[3:5])):
        fed = [[*context, *rest][:-1] for context, rest in (evaluated._encode_pair(*pair) for pair in pairs)]
        # lm-eval asks once for continuations of one token after one context: "\n" follows two different ones.
        with RealisedDensity(model) as counted:
            for ids in fed:
                model(input_ids=torch.tensor([ids]), use_cache=False)
        assert evaluated.realised[task].tokens == counted.tokens == sum(map(len, fed))
        assert evaluated.realised[task].densities() == pytest.approx(counted.densities(), abs=1e-3)


@pytest.mark.parametrize("protocol", ["every-token", "decode"])
def test_generation_decodes_natively_as_generate_does(tiny_sparse: Path, protocol: str) -> None:
    model: PreTrainedModel = _model(tiny_sparse)
    native = native_forward_of(model)
    if native is None:
        pytest.skip("the native kernels are not built")
    evaluated = _evaluated(model, tiny_sparse, protocol=protocol, batch_size=4)
    prompts = ["def mean", "import os", "x = 10"]
    found = evaluated.generate_until(_asked("generate_until", [(p, _SETTINGS) for p in prompts]), disable_tqdm=True)
    assert native.steps > 0
    assert switch_of(model).prefill == "sparse"
    sparsify.set_prefill(model, "dense" if protocol == "decode" else "sparse")
    expected, read = [], 0
    for prompt in prompts:
        ids = torch.tensor([evaluated.tok_encode(prompt)])
        written = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=1)[0]
        expected.append(evaluated.tokenizer.decode(written[ids.shape[1] :], skip_special_tokens=True))
        read += len(written) - 1 - (ids.shape[1] if protocol == "decode" else 0)
    assert found == expected
    # All of a sequence but its last token is read; "decode" counts what was read sparse.
    assert abs(evaluated.realised["task"].tokens - read) <= len(prompts)


def test_requests_that_lose_tokens_are_counted(tiny_sparse: Path) -> None:
    evaluated = _evaluated(_model(tiny_sparse), tiny_sparse)
    long = _asked("loglikelihood", [("x" * 300, " y"), ("x", " y")], "long")
    assert len(evaluated.loglikelihood(long, disable_tqdm=True)) == 2
    assert evaluated.truncated["long"] == 1


def test_progress_is_told_by_task(tiny_sparse: Path) -> None:
    evaluated = _evaluated(_model(tiny_sparse), tiny_sparse, batch_size=2)
    seen: list[tuple[str, int, int]] = []
    evaluated.progress = lambda task, done, total: seen.append((task, done, total))
    _scores(evaluated, "piqa")
    assert seen[-1] == ("piqa", len(_PAIRS), len(_PAIRS))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"protocol": "decoding"},
            "unknown protocol 'decoding': allowed are every-token, decode. Did you mean 'decode'",
        ),
        ({"batch_size": 0}, "at least 1, not 0"),
        ({"batch_size": "auto"}, "not 'auto'"),
        ({"protocol": "decode", "mixed_precision_dtype": "bfloat16"}, "leave mixed_precision_dtype out"),
    ],
)
def test_bad_options_are_refused(tiny_sparse: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsifyError, match=said):
        SparsifyLM(str(tiny_sparse), **options)


def test_a_text_longer_than_the_model_is_refused(tiny_sparse: Path) -> None:
    evaluated = _evaluated(_model(tiny_sparse), tiny_sparse)
    asked = _asked("generate_until", [("x", {"until": [], "max_gen_toks": 256})], "summary")
    with pytest.raises(SparsifyError, match="task summary writes 256 tokens, this model has 256 positions"):
        evaluated.generate_until(asked, disable_tqdm=True)
