"""Greedy against a literal transcription of TEAL's Algorithm 1, which masks inputs in copies of the linears."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, SparsifyError, Teal
from sparsify.allocation.greedy import Greedy
from sparsify.budget import split_budget
from sparsify.targets import find_targets, linear_shapes

TARGET, STEP = 0.5, 0.125


def transcribed(model: PreTrainedModel, index: int, tokens: Tensor) -> dict[str, float]:
    """Algorithm 1 for block `index` on one window: p_i += step·F/f_i for the i whose block output errs least."""
    block: nn.Module = model.model.layers[index]
    prefix = f"model.layers.{index}."
    linears = {f"{prefix}{name}": m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    shapes = linear_shapes(model, find_targets(model, tokens[None]))
    calls: list[tuple[tuple[object, ...], dict[str, object], Tensor]] = []
    inputs: dict[str, Tensor] = {}
    handles = [block.register_forward_hook(lambda m, a, k, y: calls.append((a, k, y)), with_kwargs=True)]
    for name, linear in linears.items():
        handles.append(linear.register_forward_pre_hook(lambda m, a, name=name: inputs.__setitem__(name, a[0])))
    with torch.no_grad():
        model(tokens[None], use_cache=False)
    for handle in handles:
        handle.remove()
    (args, kwargs, dense), sizes = calls[0], {name: m.weight.numel() for name, m in linears.items()}
    total = sum(sizes.values())

    def error(p: dict[str, float]) -> float:
        def mask(module: nn.Module, a: tuple[Tensor, ...], y: Tensor, name: str) -> Tensor:
            density = split_budget(name, shapes[name], sparsity=p[name], rho=1.0, score="magnitude").density
            threshold = -1.0 if density == 1.0 else float(inputs[name].abs().flatten().quantile(1 - density))
            return F.linear(torch.where(a[0].abs() > threshold, a[0], 0.0), module.weight)

        masks = [m.register_forward_hook(lambda m, a, y, name=n: mask(m, a, y, name)) for n, m in linears.items()]
        with torch.no_grad():
            out = block(*args, **kwargs)
        for handle in masks:
            handle.remove()
        return float((out - dense).norm(dim=-1).mean())

    p = dict.fromkeys(linears, 0.0)
    while sum(p[name] * sizes[name] for name in p) / total < TARGET - 1e-9:
        raised = {name: p[name] + STEP * total / sizes[name] for name in p}
        errors = {name: error(p | {name: raised[name]}) for name in p if raised[name] <= 0.95}
        best = min(errors, key=lambda name: errors[name])
        p[best] = raised[best]
    return p


def test_it_is_the_papers_algorithm(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    # k and v are too small for a step of an eighth of the block; the others have room for one or more.
    expected = {}
    for index in range(2):
        expected |= transcribed(tiny_llama, index, tiny_calibration.tokens[0])
    greedy = Greedy(step=STEP, windows=1)
    sparsify.convert(tiny_llama, Teal(sparsity=TARGET), tiny_calibration, allocation=greedy)
    entries = tiny_llama.config.quantization_config.linears
    found = {name: entry.sparsity for name, entry in entries.items()}
    moved = {name: sparsity for name, sparsity in expected.items() if sparsity > 0}
    assert len(set(moved.values())) > 1
    assert found == pytest.approx(expected, abs=1e-9)


def test_every_block_has_the_sparsity_that_was_asked_for(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    sparsify.convert(tiny_llama, Teal(sparsity=0.55), tiny_calibration, allocation=Greedy(step=0.1, windows=1))
    ledger = sparsify.ledger_of(tiny_llama)
    for block in ("model.layers.0.", "model.layers.1."):
        own = [linear for linear in ledger.linears if linear.name.startswith(block)]
        dense = sum(linear.dense_bytes for linear in own)
        assert sum(linear.touched_bytes for linear in own) == pytest.approx(0.45 * dense)


def test_a_linear_that_does_not_matter_goes_first(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with torch.no_grad():
        tiny_llama.model.layers[0].self_attn.o_proj.weight.mul_(1e-4)
    sparsify.convert(tiny_llama, Teal(sparsity=0.3), tiny_calibration, allocation=Greedy(step=0.02, windows=1))
    entries = tiny_llama.config.quantization_config.linears
    attention = [entries[f"model.layers.0.self_attn.{p}_proj"].sparsity for p in "qkvo"]
    # Nothing in a silenced attention shows in the output.
    assert min(attention) > 0.5
    assert max(entries[f"model.layers.0.mlp.{p}_proj"].sparsity for p in ("gate", "up", "down")) < 0.3


def test_a_sparsity_above_the_most_is_refused(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with pytest.raises(SparsifyError, match=r"sparsity 0\.97 is above 0\.95"):
        sparsify.convert(tiny_llama, Teal(sparsity=0.97), tiny_calibration, allocation="greedy")
