"""Running a converted model: caches, batches, compilation, dense prefill, copies, and the seam for other kernels."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

import sparsify
from sparsify.calibration import Calibration
from sparsify.errors import SparsifyError
from sparsify.kernels import dispatch
from sparsify.kernels.reference import BACKEND, sparse_linear
from sparsify.kernels.spec import Backend, SparseTensors
from sparsify.runtime import set_prefill, sparse_layers, switch_of

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="session")
def _sparse(_tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> PreTrainedModel:
    return sparsify.convert(copy.deepcopy(_tiny_llama), sparsify.RSparse(sparsity=0.5, rho=0.8), tiny_calibration)


@pytest.fixture
def sparse(_sparse: PreTrainedModel) -> PreTrainedModel:
    """A converted tiny model; each test has its own."""
    return copy.deepcopy(_sparse)


@pytest.fixture(scope="session")
def _sparse_opt(tiny_calibration: Calibration) -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return sparsify.convert(model, sparsify.RSparse(sparsity=0.5, rho=0.8), tiny_calibration)


@pytest.fixture
def sparse_opt(_sparse_opt: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(_sparse_opt)


def ids(batch: int = 2, tokens: int = 7) -> Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(7))


def left_padded(prompts: Sequence[Tensor]) -> dict[str, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    rows = [torch.cat([torch.zeros(longest - len(prompt), dtype=torch.int64), prompt]) for prompt in prompts]
    masks = [torch.arange(longest) >= longest - len(prompt) for prompt in prompts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks).long()}


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=tokens, **options).logits
    return found


def same_tokens_by_hand(model: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    """Greedy decoding without a cache: the whole sequence in every step."""
    tokens = prompt
    for _ in range(count):
        step = logits(model, tokens, use_cache=False)[:, -1].clone()
        step[:, 2] = -torch.inf
        tokens = torch.cat([tokens, step.argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_with_and_without_a_cache(sparse: PreTrainedModel, batch: int) -> None:
    prompt = ids(batch)
    options = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **GREEDY}
    cached = sparse.generate(**options)
    assert torch.equal(cached, sparse.generate(**options, use_cache=False))
    assert torch.equal(cached, same_tokens_by_hand(sparse, prompt, 8))
    with sparsify.dense(sparse):
        assert not torch.equal(cached, sparse.generate(**options)), "sparsity changed nothing"


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
def test_static_cache_is_the_dynamic_one(sparse: PreTrainedModel, prefill: str) -> None:
    set_prefill(sparse, prefill)
    prompt = ids()
    options = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **GREEDY}
    dynamic = sparse.generate(**options)
    # Compilation has its own tests; inductor would take minutes here.
    static = sparse.generate(**options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, dynamic)


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("family", ["sparse", "sparse_opt"])
def test_left_padded_batch_is_each_prompt_alone(request: pytest.FixtureRequest, family: str, prefill: str) -> None:
    model = request.getfixturevalue(family)
    set_prefill(model, prefill)
    prompts = [ids(1, length)[0] for length in (9, 4, 6)]
    together = model.generate(**left_padded(prompts), **GREEDY)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(input_ids=prompt[None], attention_mask=torch.ones(1, len(prompt)), **GREEDY)
        assert torch.equal(row[-8:], alone[0, -8:])


def test_dense_prefill_then_sparse_steps(sparse: PreTrainedModel) -> None:
    prompt, step = ids(2, 7), ids(2, 1)
    with sparsify.dense(sparse):
        dense_prefill = sparse(input_ids=prompt, use_cache=True)
    expected = logits(sparse, step, past_key_values=dense_prefill.past_key_values)
    all_sparse = logits(sparse, prompt)
    assert not torch.equal(all_sparse, dense_prefill.logits)

    set_prefill(sparse, "dense")
    found = sparse(input_ids=prompt, use_cache=True)
    assert torch.equal(found.logits, dense_prefill.logits)
    assert torch.equal(logits(sparse, step, past_key_values=found.past_key_values), expected)
    assert switch_of(sparse).sparse
    # By position and as embeddings, too.
    with torch.no_grad():
        assert torch.equal(sparse(prompt).logits, dense_prefill.logits)
        embedded = sparse.get_input_embeddings()(prompt)
        assert torch.equal(sparse(inputs_embeds=embedded).logits, dense_prefill.logits)

    set_prefill(sparse, "sparse")
    assert torch.equal(logits(sparse, prompt), all_sparse)


def test_generate_runs_a_dense_prefill_and_sparse_steps(sparse_opt: PreTrainedModel) -> None:
    set_prefill(sparse_opt, "dense")
    calls: list[tuple[int, bool]] = []
    layer = next(iter(sparse_layers(sparse_opt).values()))
    layer.register_forward_pre_hook(lambda layer, args: calls.append((args[0].shape[-2], layer.switch.sparse)))
    prompt = ids(3, 5)
    sparse_opt.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    assert calls == [(5, False)] + [(1, True)] * 7


def test_setting_the_prefill_again_leaves_one_hook(sparse: PreTrainedModel) -> None:
    for _ in range(3):
        set_prefill(sparse, "dense")
    assert len(sparse._forward_pre_hooks) == 1
    set_prefill(sparse, "sparse")
    assert not sparse._forward_pre_hooks
    with pytest.raises(SparsifyError, match="Did you mean 'dense'"):
        set_prefill(sparse, "dens")


def test_prefill_of_a_checkpoint(sparse: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = ids()
    all_sparse = logits(sparse, prompt)
    with sparsify.dense(sparse):
        dense_logits = logits(sparse, prompt)
    set_prefill(sparse, "dense")
    folder = sparsify.save(sparse, tmp_path / "sparse")
    loaded = sparsify.load(folder)
    assert switch_of(loaded).prefill == "dense"
    assert torch.equal(logits(loaded, prompt), dense_logits)
    assert torch.equal(logits(sparsify.load(folder, prefill="sparse"), prompt), all_sparse)
    monkeypatch.setenv("SPARSIFY_PREFILL", "sparse")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval(), prompt), all_sparse)


def test_dense_context_ends_with_an_exception_and_nests(sparse: PreTrainedModel) -> None:
    prompt = ids()
    all_sparse = logits(sparse, prompt)
    with pytest.raises(RuntimeError, match="stop"), sparsify.dense(sparse):
        raise RuntimeError("stop")
    assert torch.equal(logits(sparse, prompt), all_sparse)
    with sparsify.dense(sparse):
        with sparsify.dense(sparse):
            pass
        assert not torch.equal(logits(sparse, prompt), all_sparse)
    assert torch.equal(logits(sparse, prompt), all_sparse)


def test_dense_context_is_the_dense_model(sparse: PreTrainedModel, tiny_llama: PreTrainedModel) -> None:
    with sparsify.dense(sparse):
        assert torch.equal(logits(sparse, ids()), logits(tiny_llama, ids()))
    with sparsify.dense(tiny_llama):
        logits(tiny_llama, ids())
    with pytest.raises(SparsifyError, match="no sparse layers"):
        set_prefill(tiny_llama, "dense")


def test_a_failed_prefill_does_not_leave_the_model_dense(sparse: PreTrainedModel) -> None:
    set_prefill(sparse, "dense")
    step = ids(1, 1)
    expected = logits(sparse, step)
    with pytest.raises(IndexError):
        logits(sparse, torch.full((1, 5), 1000))
    assert torch.equal(logits(sparse, step), expected)


def test_a_deep_copy_has_its_own_switch(sparse: PreTrainedModel) -> None:
    prompt = ids()
    all_sparse = logits(sparse, prompt)
    set_prefill(sparse, "dense")
    dense_logits = logits(sparse, prompt)
    other = copy.deepcopy(sparse)
    assert switch_of(other) is not switch_of(sparse)
    assert len({id(layer.switch) for layer in sparse_layers(other).values()}) == 1
    set_prefill(sparse, "sparse")
    assert torch.equal(logits(sparse, prompt), all_sparse)
    assert torch.equal(logits(other, prompt), dense_logits)
    set_prefill(other, "sparse")
    assert not other._forward_pre_hooks
    assert torch.equal(logits(other, prompt), all_sparse)


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
def test_compiled_is_not_compiled(sparse: PreTrainedModel, prefill: str) -> None:
    set_prefill(sparse, prefill)
    prompt, step = ids(2, 7), ids(2, 1)
    expected = [logits(sparse, tokens, use_cache=False) for tokens in (prompt, step, prompt)]
    torch._dynamo.reset()
    # Everything of a compilation but inductor's code, which would take minutes to build.
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True, dynamic=False)
    # The prompt again after a step: compiled code must not keep the switch of its first call.
    found = [logits(compiled, tokens, use_cache=False) for tokens in (prompt, step, prompt)]
    torch._dynamo.reset()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_compiled_code_follows_the_dense_context(sparse: PreTrainedModel) -> None:
    prompt = ids()
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="eager", fullgraph=True)
    sparse_logits = logits(compiled, prompt, use_cache=False)
    with sparsify.dense(sparse):
        dense_logits = logits(compiled, prompt, use_cache=False)
        torch.testing.assert_close(dense_logits, logits(sparse, prompt, use_cache=False))
    torch.testing.assert_close(logits(compiled, prompt, use_cache=False), sparse_logits)
    torch._dynamo.reset()


class FakeKernels:
    """A backend that wants channel-contiguous weights, checks that it gets them, and marks its result."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Sequence[SparseTensors]]] = []
        self.backend = Backend("fake", 10, True, lambda device, dtype, inputs, outputs: inputs == 64, self.run)

    def run(self, x: Tensor, site: Sequence[SparseTensors]) -> list[Tensor]:
        for tensors in site:
            assert tensors.weight.stride() == (1, tensors.weight.shape[0])
            assert tensors.weight.untyped_storage().nbytes() == tensors.weight.nbytes
        self.calls.append((x, site))
        return [sparse_linear(x, tensors) + 1.0 for tensors in site]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeKernels:
    kernels = FakeKernels()
    monkeypatch.setattr(dispatch, "backends", lambda: (kernels.backend, BACKEND))
    return kernels


def test_a_backend_gets_its_layout_and_its_result_is_used(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, fake: FakeKernels
) -> None:
    sparsify.convert(tiny_llama, sparsify.RSparse(sparsity=0.5, rho=0.8), tiny_calibration)
    layers = sparse_layers(tiny_llama)
    for name, layer in layers.items():
        assert layer.backend.name == ("reference" if "down_proj" in name else "fake")
        assert layer.weight.is_contiguous() == (layer.backend.name == "reference")
        # The row-major weight is gone: nothing but the parameter holds its memory.
        assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
    layer = layers["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 3, 64)
    y = layer(x)
    (seen, site) = fake.calls[-1]
    assert seen is x
    assert site[0].weight.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(y, sparse_linear(x, layer.tensors()) + 1.0)


def test_a_backends_layout_survives_saving_and_casting(
    sparse: PreTrainedModel, fake: FakeKernels, tmp_path: Path
) -> None:
    weights = {name: layer.weight.detach().clone() for name, layer in sparse_layers(sparse).items()}
    sparse.to(torch.float64).to(torch.float32)
    first = next(iter(sparse_layers(sparse).values()))
    assert first.backend is fake.backend
    assert first.weight.stride() == (1, 64)
    loaded = sparsify.load(sparsify.save(sparse, tmp_path / "sparse"))
    for name, layer in sparse_layers(loaded).items():
        assert torch.equal(layer.weight, weights[name])
        assert layer.weight.is_contiguous() == ("down_proj" in name)
    assert torch.equal(logits(loaded, ids()), logits(sparse, ids()))


def test_a_backend_can_be_named(sparse: PreTrainedModel, fake: FakeKernels, tmp_path: Path) -> None:
    folder = sparsify.save(sparse, tmp_path / "sparse")
    loaded = sparsify.load(folder, backend="reference")
    assert {layer.backend.name for layer in sparse_layers(loaded).values()} == {"reference"}
    # The reference is slow on channel-contiguous bf16: a named backend gets its own layout back, and keeps its name.
    assert all(layer.weight.is_contiguous() for layer in sparse_layers(loaded).values())
    loaded.to(torch.float64)
    assert {layer.backend.name for layer in sparse_layers(loaded).values()} == {"reference"}
    with pytest.raises(SparsifyError, match="backend 'fake' does not support"):
        sparsify.load(folder, backend="fake")
    with pytest.raises(SparsifyError, match="unknown backend 'fak'"):
        sparsify.load(folder, backend="fak")
