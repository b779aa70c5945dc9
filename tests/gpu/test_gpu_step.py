"""One decode step by the Triton kernels against transformers' own code: logits, caches, and what it refuses."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import sparsify

pytest.importorskip("triton")

from sparsify.errors import SparsifyError
from sparsify.gpu_step import GpuStep, problem
from sparsify.kernels.gpu.launch import counted
from sparsify.runtime import dense, sparse_layers

MakeModel = Callable[..., PreTrainedModel]

_PROMPT, _STEPS = 8, 3
_METHODS: dict[str, Callable[[], Any]] = {
    "dense": lambda: None,
    "teal": lambda: sparsify.Teal(sparsity=0.5),
    "teal-compensated": lambda: sparsify.Teal(sparsity=0.5, compensate=True),
    "wina": lambda: sparsify.Wina(sparsity=0.5),
    "rsparse": lambda: sparsify.RSparse(sparsity=0.5, rho=0.8),
}


def _compared(
    model: PreTrainedModel, batch: int, *, run_dense: bool = False, steps: int = _STEPS, cache_difference: float = 1e-4
) -> float:
    """Returns the worst relative difference of the steps' logits to transformers', both fed the same tokens."""
    forward: Any = type(model).forward
    ids = torch.randint(3, model.config.vocab_size, (batch, _PROMPT + steps), device=model.device)
    worst = 0.0
    with torch.no_grad(), dense(model) if run_dense else nullcontext():
        cache = DynamicCache(config=model.config)
        forward(model, input_ids=ids[:, :_PROMPT], past_key_values=cache, use_cache=True)
        step = GpuStep(model, batch=batch, capacity=300, run_dense=run_dense)
        step.fill(cache, _PROMPT)
        for index in range(_PROMPT, _PROMPT + steps):
            step.tokens.copy_(ids[:, index])
            found = step().clone()
            step.position.add_(1)
            out = forward(model, input_ids=ids[:, index : index + 1], past_key_values=cache, use_cache=True)
            expected = out.logits[:, -1]
            worst = max(worst, float((found - expected).norm() / expected.norm()))
        assert _cache_difference(step, cache, _PROMPT + steps) < cache_difference
    return worst


def _cache_difference(step: GpuStep, cache: Any, length: int) -> float:
    """The largest distance of a key or value, one head of one token, over the length of the longest."""
    worst = 0.0
    for number, layer in enumerate(cache.layers):
        held = layer.keys.shape[-2]
        for ours, theirs in ((step.keys[number], layer.keys), (step.values[number], layer.values)):
            found, expected = ours[:, :, length - held : length].float(), theirs.float()
            worst = max(worst, float((found - expected).norm(dim=-1).max() / expected.norm(dim=-1).max()))
    return worst


@pytest.mark.parametrize("method", list(_METHODS))
@pytest.mark.parametrize("family", ["llama", "biased", "mistral", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers(family: str, method: str, make_model: MakeModel) -> None:
    # All families dense; the methods' tensors meet the kernels once, and with biases.
    if family not in ("llama", "biased") and method in ("wina", "rsparse"):
        pytest.skip("the same kernels as with llama and biased")
    assert _compared(make_model(family, _METHODS[method]()), 1) < 1e-5


@pytest.mark.parametrize("method", ["dense", "teal", "rsparse"])
def test_several_sequences(method: str, make_model: MakeModel) -> None:
    assert _compared(make_model("biased", _METHODS[method]()), 3, steps=2) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_lists_of_channels_instead_of_masks(batch: int, make_model: MakeModel) -> None:
    model = make_model("qwen2", sparsify.Teal(sparsity=0.8))
    for layer in sparse_layers(model).values():
        layer.density = 0.9
    masks = GpuStep(model, batch=batch, capacity=64)
    for layer in sparse_layers(model).values():
        layer.density = 0.2
    lists = GpuStep(model, batch=batch, capacity=64)
    with counted() as of_masks:
        masks()
    with counted() as of_lists:
        lists()
    kernels = [launch.kernel for launch in of_lists]
    # The norms make the lists of one token; o and down, and every site of several tokens, need a launch for theirs.
    assert kernels.count("select") == (2 if batch == 1 else 4) * model.config.num_hidden_layers
    assert len(of_lists) - len(of_masks) == kernels.count("select")
    assert _compared(model, batch, steps=2) < 1e-5


def test_a_step_makes_seven_launches_a_block(make_model: MakeModel) -> None:
    model = make_model("llama", sparsify.Teal(sparsity=0.5))
    step = GpuStep(model, batch=1, capacity=64)
    with counted() as launches:
        step()
    a_block = ["add_norm", "sparse_gemv", "decode_attention", "sparse_gemv", "add_norm", "sparse_gemv", "sparse_gemv"]
    assert [launch.kernel for launch in launches] == a_block * model.config.num_hidden_layers + ["add_norm"]


@pytest.mark.parametrize("batch", [1, 2])
def test_sparsity_switched_off(batch: int, make_model: MakeModel) -> None:
    assert _compared(make_model("llama", sparsify.RSparse(sparsity=0.5, rho=0.8)), batch, run_dense=True) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, make_model: MakeModel, device: torch.device) -> None:
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert _compared(make_model("llama", None, dtype), 1, cache_difference=tolerance) < tolerance
    if dtype == torch.bfloat16 and device.type == "cpu":
        # The interpreter truncates to bf16: too many inputs fall to the other side of a threshold.
        return
    # One input that was rounded to the other side of a threshold moves an output by as much as the threshold.
    model = make_model("llama", sparsify.Teal(sparsity=0.3), dtype)
    assert _compared(model, 1, cache_difference=0.3) < 0.15


def test_a_block_that_is_partly_converted(make_model: MakeModel) -> None:
    model = make_model("qwen2", sparsify.Teal(sparsity=0.5))
    model_: Any = model
    inner = model_.model.layers[0].self_attn
    for name in ("k_proj", "o_proj"):
        layer = getattr(inner, name)
        linear = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None).to(model.device)
        linear.weight.data = layer.weight.data.contiguous()
        linear.bias = layer.bias
        setattr(inner, name, linear)
    assert _compared(model, 1, steps=2) < 1e-5


def test_merged_weights_are_the_same_weights(make_model: MakeModel, tmp_path: Any) -> None:
    model = make_model("qwen2")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first = GpuStep(model, batch=1, capacity=64)
    model_: Any = model
    mlp = model_.model.layers[0].mlp
    assert mlp.up_proj.weight.data_ptr() == mlp.gate_proj.weight.data_ptr() + mlp.gate_proj.weight.nbytes
    # A second step finds them merged, so that the first one's pointers stay right.
    GpuStep(model, batch=1, capacity=64)
    assert first.is_current()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for found in (model.state_dict(), loaded.state_dict()):
        assert set(found) == set(before)
        assert all(torch.equal(found[name].cpu(), t.cpu()) for name, t in before.items())


def test_steps_share_a_cache(make_model: MakeModel) -> None:
    model = make_model("llama", sparsify.Teal(sparsity=0.5))
    first = GpuStep(model, batch=1, capacity=64)
    second = GpuStep(model, batch=1, capacity=64, run_dense=True, share=first)
    assert all(a is b for a, b in zip(first.keys, second.keys, strict=True))
    with pytest.raises(SparsifyError, match=r"the cache to share is \[1, 2, 64, 12\], \[2, 2, 64, 12\] is needed"):
        GpuStep(model, batch=2, capacity=64, share=first)


def test_a_changed_model_is_noticed(make_model: MakeModel) -> None:
    model = make_model("llama", sparsify.Teal(sparsity=0.5))
    model_: Any = model
    step = GpuStep(model, batch=1, capacity=64)
    assert step.is_current()
    handle = model_.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert not step.is_current()
    handle.remove()
    assert step.is_current()
    model_.model.norm.weight.data = model_.model.norm.weight.data.clone()
    assert not step.is_current()


def test_what_cannot_be_stepped_is_said(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", sparsify.Teal(sparsity=0.5))
    assert problem(model) is None
    with pytest.raises(SparsifyError, match="a batch of 9: the GPU step takes 1 to 8 sequences"):
        GpuStep(model, batch=9, capacity=64)
    step = GpuStep(model, batch=1, capacity=16)
    with pytest.raises(SparsifyError, match="a prompt of 16 tokens leaves no room in a cache of 16"):
        step.fill(DynamicCache(config=model.config), 16)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).to(model.device)
    assert "GPT2LMHeadModel is not one of" in str(problem(other))
    with pytest.raises(SparsifyError, match="GPT2LMHeadModel cannot decode by the GPU step"):
        GpuStep(other, batch=1, capacity=16)
    assert "is needed" in str(problem(make_model("llama", None, torch.float64)))
    layer = next(iter(sparse_layers(model).values()))
    monkeypatch.setattr(layer, "backend", sparsify.kernels.reference.BACKEND)
    assert "runs on the backend reference" in str(problem(model))


@pytest.mark.gpu
def test_two_runs_give_the_same_bits(make_model: MakeModel) -> None:
    model = make_model("biased", sparsify.RSparse(sparsity=0.5, rho=0.8), torch.bfloat16)
    step = GpuStep(model, batch=2, capacity=64)

    def logits() -> Tensor:
        step.position.zero_()
        step.tokens.fill_(7)
        return torch.stack([(step().clone(), step.position.add_(1))[0] for _ in range(8)])

    assert torch.equal(logits(), logits())
