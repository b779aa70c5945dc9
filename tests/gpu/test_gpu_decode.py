"""`generate` by graphs against transformers' own loop: the same tokens, and its own loop wherever more is asked."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxTimeCriteria

import sparsify

pytest.importorskip("triton")

from sparsify.errors import SparsifyError
from sparsify.gpu_decode import Choice, Generate, GpuDecoder, disable, enable, enable_on_gpu, generate_of, rounded_up
from sparsify.runtime import dense, set_prefill

MakeModel = Callable[..., PreTrainedModel]


def _ids(model: PreTrainedModel, batch: int = 1, length: int = 5) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1)).to(
        model.device
    )


def _both(model: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What the class's own generate gives and what the model's does, from the same random state."""
    own: Any = type(model)
    torch.manual_seed(5)
    expected = own.generate(model, *args, **kwargs)
    torch.manual_seed(5)
    return expected, model.generate(*args, **kwargs)  # type: ignore[operator]


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    model = make_model("shallow", sparsify.Teal(sparsity=0.5))
    enable(model)
    return model


_SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "warped": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min-p": {"do_sample": True, "temperature": 1.5, "min_p": 0.05},
    "ends": {"do_sample": True, "temperature": 3.0, "eos_token_id": list(range(5, 40))},
    "one end": {"do_sample": False, "eos_token_id": 7, "pad_token_id": 3},
}


@pytest.mark.parametrize(("name", "batch"), [*((name, 1) for name in _SETTINGS), ("warped", 2), ("ends", 2)])
def test_the_tokens_are_those_of_transformers(name: str, batch: int, model: PreTrainedModel, device: Any) -> None:
    if device.type == "cuda" and _SETTINGS[name]["do_sample"]:
        pytest.skip("a graph draws its random numbers in another order on a GPU")
    expected, found = _both(model, _ids(model, batch), max_new_tokens=6, **_SETTINGS[name])
    assert torch.equal(found, expected)
    generate = generate_of(model)
    assert generate is not None
    assert generate.used == 1


def test_a_dense_model_too(make_model: MakeModel) -> None:
    model = make_model("qwen3")
    enable(model)
    expected, found = _both(model, input_ids=_ids(model), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)
    disable(model)
    assert generate_of(model) is None


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.5},
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(60.0)])},
        {"cache_implementation": "static", "disable_compile": True},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_unusual_is_left_to_transformers(asked: dict[str, Any], model: PreTrainedModel) -> None:
    asked = {name: value.to(model.device) if name == "attention_mask" else value for name, value in asked.items()}
    expected, found = _both(model, _ids(model), **{"max_new_tokens": 3, "do_sample": False} | asked)
    tokens = [out.sequences if hasattr(out, "sequences") else out for out in (expected, found)]
    assert torch.equal(*tokens)
    generate = generate_of(model)
    assert generate is not None
    assert generate.used == 0


def test_a_cache_of_the_callers_and_nine_sequences_are_left_to_transformers(model: PreTrainedModel) -> None:
    ids = _ids(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        type(model).forward(model, input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)  # type: ignore[arg-type]
    model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    model.generate(_ids(model, 9, 2), max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    generate = generate_of(model)
    assert generate is not None
    assert generate.used == 0


def test_a_hook_is_called(model: PreTrainedModel) -> None:
    seen = []
    model_: Any = model
    handle = model_.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
    written = model_.generate(_ids(model), max_new_tokens=4, do_sample=False)
    assert len(seen) == written.shape[1] - 5
    handle.remove()
    model_.generate(_ids(model), max_new_tokens=4, do_sample=False)
    assert generate_of(model).used == 1  # type: ignore[union-attr]


def test_dense_and_sparse_have_their_own_steps(model: PreTrainedModel) -> None:
    model_: Any = model
    with dense(model):
        expected, found = _both(model, _ids(model), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)
    again, sparse = _both(model, _ids(model), max_new_tokens=4, do_sample=False)
    assert torch.equal(sparse, again)
    set_prefill(model, "dense")
    expected, found = _both(model, _ids(model), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)
    assert model_.generate.used == 3


def test_a_longer_text_gets_a_larger_cache(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify import gpu_decode

    assert [rounded_up(n) for n in (1, 512, 513)] == [512, 512, 1024]
    monkeypatch.setattr(gpu_decode, "_CAPACITY", 8)
    decoder = GpuDecoder(model, capacity=8)
    first = decoder.generate(_ids(model), 3)
    assert decoder.step.capacity == 8
    longer = decoder.generate(_ids(model), 9)
    assert decoder.step.capacity == 16
    assert torch.equal(longer[:, :8], first)


def test_a_changed_model_is_decoded_anew(model: PreTrainedModel) -> None:
    model_: Any = model
    before = model_.generate(_ids(model), max_new_tokens=4, do_sample=False)
    weight = model_.lm_head.weight
    weight.data = weight.data.flip(0).contiguous()
    expected, found = _both(model, _ids(model), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_copies_have_their_own(model: PreTrainedModel) -> None:
    model_: Any = model
    model_.generate(_ids(model), max_new_tokens=2, do_sample=False)
    copied = copy.deepcopy(model)
    generate = generate_of(copied)
    assert generate is not None
    assert generate.model is copied
    assert generate.used == 0
    restored = pickle.loads(pickle.dumps(generate_of(model)))
    assert isinstance(restored, Generate)


def test_following_a_text(model: PreTrainedModel) -> None:
    text = _ids(model, 2, 9)
    decoder = GpuDecoder(model, batch=2)
    decoder.prefill(text[:, :5])
    replay = decoder.following(text)
    decoder.start(text[:, 5], 5)
    for index in range(5, 8):
        replay()
        assert torch.equal(decoder.step.tokens, text[:, index + 1])
    with torch.no_grad():
        expected = type(model).forward(model, input_ids=text[:, :8]).logits[:, -1]  # type: ignore[arg-type]
    torch.testing.assert_close(decoder.logits, expected, rtol=1e-3, atol=1e-3)


def test_inference_mode_leaves_usable_buffers(model: PreTrainedModel) -> None:
    model_: Any = model
    with torch.inference_mode():
        first = model_.generate(_ids(model), max_new_tokens=3, do_sample=False)
    assert torch.equal(model_.generate(_ids(model), max_new_tokens=3, do_sample=False), first)


def test_errors_name_what_is_wrong(model: PreTrainedModel, make_model: MakeModel) -> None:
    with pytest.raises(SparsifyError, match="2 sequences: this decoder was made for 1"):
        GpuDecoder(model).prefill(_ids(model, 2))
    other = make_model("llama", None, torch.float64)
    with pytest.raises(SparsifyError, match="LlamaForCausalLM cannot decode by CUDA graphs: the model is in"):
        enable(other)
    enable_on_gpu(other)
    assert other.generate(_ids(other), max_new_tokens=2, do_sample=False).shape == (1, 7)  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_gives_what_plain_calls_give(batch: int, dtype: torch.dtype, make_model: MakeModel) -> None:
    model = make_model("qwen3", sparsify.RSparse(sparsity=0.5, rho=0.8), dtype)
    decoder = GpuDecoder(model, batch=batch)
    ids = _ids(model, batch)
    found = decoder.generate(ids, 40)
    again = decoder.generate(ids, 40)
    assert torch.equal(found, again)
    plain = GpuDecoder(model, batch=batch)
    plain.prefill(ids)
    plain.start(found[:, 5], 5)
    for index in range(5, 44):
        logits = plain.step()
        assert torch.equal(logits.argmax(-1), found[:, index + 1])
        plain.step.position.add_(1)
        plain.step.tokens.copy_(found[:, index + 1])


@pytest.mark.gpu
def test_sampling_in_a_graph_draws_anew_and_repeats_with_the_seed(make_model: MakeModel) -> None:
    model = make_model("llama", sparsify.Teal(sparsity=0.5))
    decoder = GpuDecoder(model)
    choice = Choice(sample=True)
    decoder.generate(_ids(model), 8, choice)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(decoder.generate(_ids(model), 30, choice))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    # Every step draws anew: one number for all would repeat a token for ever where the scores are flat.
    assert len(drawn[0][0, 5:].unique()) > 5
