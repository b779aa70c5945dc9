"""Compensation: the mean of what is dropped given back as a bias: equations, bytes, disk and decoding."""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparsify
from sparsify import Calibration, RSparse, StatisticalTopK, Teal, TopK, Wina, native_decode
from sparsify.calibration import hooked
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.evals.compare import parse_method
from sparsify.kernels import library
from sparsify.methods import Method
from sparsify.runtime import sparse_layers

METHODS: list[Method] = [
    Teal(0.5, compensate=True),
    Wina(0.5, compensate=True),
    RSparse(0.5, rho=0.7, compensate=True),
    TopK(0.5, compensate=True),
    StatisticalTopK(0.5, compensate=True),
]
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
TOKENS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture
def model(tiny_llama: PreTrainedModel) -> PreTrainedModel:
    """tiny_llama with biases in every linear, so that a compensation is added to something."""
    config = LlamaConfig(**tiny_llama.config.to_dict() | {"attention_bias": True, "mlp_bias": True})
    biased: PreTrainedModel = LlamaForCausalLM(config).eval()
    biased.load_state_dict(tiny_llama.state_dict(), strict=False)
    for name, parameter in biased.named_parameters():
        if name.endswith(".bias"):
            parameter.data = 0.1 * torch.randn_like(parameter)
    return biased


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def dense_inputs(model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
    """Inputs [T, I] of two linears of the dense model on the whole calibration text."""
    seen: dict[str, list[Tensor]] = {Q: [], DOWN: []}
    modules = {name: model.get_submodule(name) for name in seen}
    with torch.no_grad(), hooked(modules, lambda name, x: seen[name].append(x.flatten(0, -2))):
        for window in calibration.tokens:
            model(window[None], use_cache=False)
    return {name: torch.cat(parts) for name, parts in seen.items()}


@by_method
def test_output_is_the_equation(method: Method, model: PreTrainedModel, tiny_calibration: Calibration) -> None:
    """y = W(m⊙x) + L((1−m)⊙x) + b + c with c = R·E[(1−m)⊙x], R = W − L, the mean over the calibration text."""
    inputs = dense_inputs(model, tiny_calibration)
    sparsify.convert(model, method, tiny_calibration)
    for name, x in inputs.items():
        layer: Any = sparse_layers(model)[name]
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        low = torch.zeros_like(weight) if layer.lr_a is None else layer.lr_b.double() @ layer.lr_a.double()
        m, x = layer.keep(x).double(), x.double()
        c = (weight - low) @ ((1 - m) * x).mean(0)
        expected = (m * x) @ weight.T + ((1 - m) * x) @ low.T + bias + c
        # fp32 sums of up to a hundred products.
        torch.testing.assert_close(layer(x.float()).detach().double(), expected, rtol=1e-4, atol=1e-4)
        assert float(c.norm()) > 0.01


@by_method
def test_nothing_is_missing_on_average(method: Method, model: PreTrainedModel, tiny_calibration: Calibration) -> None:
    inputs = dense_inputs(model, tiny_calibration)
    plain = sparsify.convert(copy.deepcopy(model), _without(method), tiny_calibration)
    sparsify.convert(model, method, tiny_calibration)
    for name, x in inputs.items():
        layer = sparse_layers(model)[name]
        with torch.no_grad(), sparsify.dense(model):
            dense = layer(x)
        with torch.no_grad():
            missing = (dense - layer(x)).double().mean(0).norm()
            before = (dense - sparse_layers(plain)[name](x)).double().mean(0).norm()
        assert float(missing) < 1e-5
        assert float(before) > 0.01


def _without(method: Method) -> Method:
    options = {k: v for k, v in vars(method).items() if k != "compensate"}
    return type(method)(**options)


@by_method
def test_its_bytes_are_paid(method: Method, model: PreTrainedModel, tiny_calibration: Calibration) -> None:
    plain = sparsify.convert(copy.deepcopy(model), _without(method), tiny_calibration)
    sparsify.convert(model, method, tiny_calibration)
    without = {linear.name: linear for linear in sparsify.ledger_of(plain).linears}
    for linear in sparsify.ledger_of(model).linears:
        assert linear.compensated
        assert linear.overhead_bytes == without[linear.name].overhead_bytes + 4 * linear.outputs
        assert linear.density < without[linear.name].density or method.name == "topk"
        # A k or a density of whole channels leaves less than one channel over.
        left = 0.5 * linear.dense_bytes - linear.touched_bytes
        assert -0.01 <= left < (4 * linear.outputs if method.name == "topk" else 0.01)


@pytest.mark.parametrize("allocation", ["greedy", "sensitivity"])
def test_allocations_pay_them_too(allocation: str, model: PreTrainedModel, tiny_calibration: Calibration) -> None:
    method = RSparse(0.5, score="auto", compensate=True)
    sparsify.convert(model, method, tiny_calibration, allocation=allocation)
    ledger = sparsify.ledger_of(model)
    # Greedy leaves a linear dense where that is best.
    assert all(linear.compensated or linear.density == 1.0 for linear in ledger.linears)
    assert any(linear.compensated for linear in ledger.linears)
    assert ledger.touched_bytes == pytest.approx(0.5 * ledger.dense_bytes, abs=0.01)


@by_method
def test_dense_forwards_do_not_have_it(method: Method, model: PreTrainedModel, tiny_calibration: Calibration) -> None:
    expected, before = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    sparsify.convert(model, method, tiny_calibration)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with sparsify.dense(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), expected, atol=1e-3)


def test_sparsity_0_has_nothing_to_compensate(model: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(model, Teal(0.0, compensate=True), tiny_calibration)
    assert all(layer.sparse_bias is None for layer in sparse_layers(model).values())


@by_method
def test_it_comes_back(method: Method, model: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path) -> None:
    dense = logits(model)
    sparsify.convert(model, method, tiny_calibration)
    folder = sparsify.save(model, tmp_path / "saved")
    again = sparsify.load(folder)
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert f"{Q}.sparse_bias" in before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(again), logits(model))
    assert sparsify.verify(folder) == []
    assert torch.equal(logits(sparsify.load(folder, dense=True)), dense)
    entries = again.config.quantization_config.linears.values()
    assert all(entry.compensated for entry in entries)


def test_files_without_it_do_not_name_it(model: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path) -> None:
    sparsify.convert(model, Teal(0.5), tiny_calibration)
    folder = sparsify.save(model, tmp_path / "saved")
    for name in ("config.json", "sparsify_ledger.json", "README.md"):
        assert "compensat" not in (folder / name).read_text()


def test_it_follows_casts_and_copies(model: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(model, Teal(0.5, compensate=True), tiny_calibration)
    sparse = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), sparse)
    before = sparse_layers(model)[Q].sparse_bias.clone()
    layer: Any = sparse_layers(model.to(torch.bfloat16))[Q]
    assert layer.tensors().bias is layer.sparse_bias
    assert torch.equal(layer.sparse_bias, before.bfloat16())
    assert layer.to("meta").sparse_bias.is_meta


@pytest.mark.skipif(library.load() is None, reason=str(library.missing()))
@pytest.mark.parametrize("biased", [True, False])
def test_native_decode_steps_have_it_where_they_are_sparse(
    biased: bool, model: PreTrainedModel, tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    chosen = model if biased else tiny_llama
    sparsify.convert(chosen, RSparse(0.5, rho=0.7, compensate=True), tiny_calibration)
    forward = native_decode.native_forward_of(chosen)
    assert forward is not None

    @torch.no_grad()
    def decode() -> Tensor:
        cache = DynamicCache(config=chosen.config)
        chosen(input_ids=TOKENS[:1, :4], past_key_values=cache, use_cache=True)
        steps = []
        for i in range(4, 10):
            # One step sparse, one dense, of the same plan.
            with sparsify.dense(chosen) if i % 2 else nullcontext():
                steps.append(chosen(input_ids=TOKENS[:1, i : i + 1], past_key_values=cache, use_cache=True).logits)
        return torch.cat(steps)

    with native_decode.transformers_path(chosen):
        expected = decode()
    before = forward.steps
    found = decode()
    assert forward.steps == before + 6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _changed(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name].clone()).contiguous()

    return apply


BIAS = f"{Q}.sparse_bias"
HOSTILE: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "NaN": (_changed(BIAS, lambda t: t.fill_(float("nan"))), "sparse_bias holds values that are not finite"),
    "infinite": (_changed(BIAS, lambda t: t.fill_(float("inf"))), "sparse_bias holds values that are not finite"),
    "missing": (_changed(BIAS, None), "no '.*q_proj.sparse_bias'"),
    "of another shape": (_changed(BIAS, lambda t: t[:-1]), r"sparse_bias has the shape \[63\], \[64\]"),
    "integers": (_changed(BIAS, lambda t: t.int()), "q_proj.sparse_bias"),
    "one too many": (
        lambda tensors: tensors.update({"lm_head.sparse_bias": torch.zeros(4)}),
        "'lm_head.sparse_bias', which its quantization_config does not name",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_are_one_clear_error(
    case: str, tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path
) -> None:
    change, message = HOSTILE[case]
    sparsify.convert(tiny_llama, Teal(0.5, compensate=True), tiny_calibration)
    folder = sparsify.save(tiny_llama, tmp_path / "saved")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        sparsify.load(folder)
    assert any("sparse_bias" in problem for problem in sparsify.verify(folder))


def test_a_configuration_that_does_not_name_it_is_refused(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path
) -> None:
    sparsify.convert(tiny_llama, Teal(0.5, compensate=True), tiny_calibration)
    folder = sparsify.save(tiny_llama, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["linears"][Q]["compensated"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj\.sparse_bias', which its quantization_config does not name"):
        sparsify.load(folder)


def test_labels_and_bad_values() -> None:
    assert parse_method("teal:compensate=true", 0.5) == Teal(0.5, compensate=True)
    assert parse_method("rsparse:rho=0.9,compensate=true@greedy", 0.5) == RSparse(0.5, rho=0.9, compensate=True)
    with pytest.raises(SparsifyError, match=r"compensate is 1\.0: it must be true or false"):
        parse_method("teal:compensate=1", 0.5)
    with pytest.raises(SparsifyError, match="compensate is 'yes'"):
        Wina(0.5, compensate="yes")  # type: ignore[arg-type]
    with pytest.raises(SparsifyError, match="takes no option 'compensate'"):
        parse_method("auto:compensate=true", 0.5)
