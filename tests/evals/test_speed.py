"""Decode speed: which sides there are, what they run, a result that is complete and consistent; no time is asserted."""

import copy
import json
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from sparsify.calibration import Calibration
from sparsify.conversion import convert
from sparsify.errors import SparsifyError
from sparsify.evals import sides as sides_module
from sparsify.evals import speed
from sparsify.evals.decoding import WARM_UP_STEPS, Side, count, decode
from sparsify.evals.shapes import teal_thresholds
from sparsify.evals.sides import CHECKED_STEPS, dense_copy, prepared, sides_of
from sparsify.evals.speed import decode_speed
from sparsify.kernels import library
from sparsify.ledger import ledger_of
from sparsify.linear import SparseLinear
from sparsify.methods.teal import Teal
from sparsify.native_decode import native_forward_of
from sparsify.runtime import sparse_layers

pytestmark = pytest.mark.usefixtures("small_stream")

_PROMPT, _NEW = 6, 5
native_only = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def _tokens(batch: int = 1, length: int = _PROMPT + WARM_UP_STEPS + _NEW) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length))


@pytest.fixture
def converted(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> PreTrainedModel:
    return convert(tiny_llama, Teal(sparsity=0.5), tiny_calibration)


@pytest.fixture
def rows(tiny_llama: PreTrainedModel) -> PreTrainedModel:
    """The dense weights once more. Named before `converted`, which changes the model."""
    return copy.deepcopy(tiny_llama)


def test_a_converted_model_has_every_side(rows: PreTrainedModel, converted: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    result = decode_speed(
        converted, _tokens(), prompt_tokens=_PROMPT, rounds=2, rows=rows, progress=lambda a, b: seen.append((a, b))
    )
    assert seen == [(1, 2), (2, 2)]
    native = library.load() is not None
    assert list(result.sides) == ["sparse", "dense", *(["dense-rows"] if native else []), "transformers"]
    assert [side.sparse for side in result.sides.values()] == [True] + [False] * (len(result.sides) - 1)
    for name, side in result.sides.items():
        assert side.path == ("native" if native and name != "transformers" else "transformers")
        assert len(side.ms_by_round) == 2
        assert 0 < side.ms_per_step.p10 <= side.ms_per_step.median <= side.ms_per_step.p90
        assert side.tokens_per_second == pytest.approx(1e3 / side.ms_per_step.median)
        assert side.gb_per_second == pytest.approx(side.touched.bytes_per_step / side.ms_per_step.median / 1e6)
        # Sums in another order in fp32: every side computes the same model.
        assert side.logits_difference is None or side.logits_difference < 1e-4
    assert result.best_dense != "sparse"
    fastest = min((s.ms_per_step.median, name) for name, s in result.sides.items() if not s.sparse)
    assert result.best_dense == fastest[1]
    assert (result.new_tokens, result.batch, result.rounds) == (_NEW, 1, 2)


def test_ratios_are_those_of_the_rounds(rows: PreTrainedModel, converted: PreTrainedModel) -> None:
    result = decode_speed(converted, _tokens(), prompt_tokens=_PROMPT, rounds=3, rows=rows)
    assert set(result.ratios) == set(result.sides)
    for a, others in result.ratios.items():
        assert set(others) == set(result.sides) - {a}
        for b, found in others.items():
            pairs = zip(result.sides[b].ms_by_round, result.sides[a].ms_by_round, strict=True)
            assert found.median == pytest.approx(sorted(slow / fast for slow, fast in pairs)[1])


def test_bytes_are_the_ledgers(converted: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "cache_of", lambda device: int(ledger.dense_bytes))
    ledger = ledger_of(converted)
    result = decode_speed(converted, _tokens(), prompt_tokens=_PROMPT, rounds=1)
    sparse, dense = result.sides["sparse"], result.sides["dense"]
    assert dense.touched.bytes_per_step == ledger.dense_bytes + ledger.rest_bytes
    saved = dense.touched.bytes_per_step - sparse.touched.bytes_per_step
    assert saved == pytest.approx(sparse.touched.realised_sparsity * ledger.dense_bytes)
    assert sparse.touched.nominal_sparsity == 0.5
    assert 0.2 < sparse.touched.realised_sparsity < 0.8
    assert (dense.fits_in_cache, sparse.fits_in_cache) == (False, True)
    assert dense.limit_ms / sparse.limit_ms == pytest.approx(
        dense.touched.bytes_per_step / sparse.touched.bytes_per_step
    )


def test_the_document_is_json(converted: PreTrainedModel) -> None:
    result = decode_speed(converted, _tokens(2), prompt_tokens=_PROMPT, rounds=1)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["versions"]["torch"] == torch.__version__
    assert data["prefill"] == "sparse"
    assert data["stream"]["gb_per_second"]["median"] > 0
    assert set(data) >= {"cpu", "isa", "threads", "date", "protocol", "backends", "dtype", "native_problem", "left_out"}
    assert data["sides"]["sparse"]["touched"].keys() == {
        "bytes_per_step", "nominal_sparsity", "weighted_sparsity", "realised_sparsity"
    }  # fmt: skip


def test_thresholds_give_a_side_each(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    thresholds = teal_thresholds(tiny_llama, tiny_calibration, [0.3, 0.7])
    convert(tiny_llama, Teal(sparsity=0.3), tiny_calibration)
    result = decode_speed(tiny_llama, _tokens(), prompt_tokens=_PROMPT, rounds=1, thresholds=thresholds)
    assert list(result.sides) == ["sparse-30", "sparse-70", "dense"]
    less, more = (result.sides[name].touched for name in ("sparse-30", "sparse-70"))
    assert (less.nominal_sparsity, more.nominal_sparsity) == (0.3, 0.7)
    assert less.weighted_sparsity == pytest.approx(0.3, abs=0.01)
    assert more.weighted_sparsity == pytest.approx(0.7, abs=0.01)
    assert less.realised_sparsity < more.realised_sparsity
    assert less.bytes_per_step > more.bytes_per_step


@native_only
def test_a_dense_model_is_measured_natively_and_by_transformers(tiny_llama: PreTrainedModel) -> None:
    result = decode_speed(tiny_llama, _tokens(), prompt_tokens=_PROMPT, rounds=1)
    assert {name: side.path for name, side in result.sides.items()} == {
        "dense": "native", "transformers": "transformers"
    }  # fmt: skip
    assert result.backends == []
    embedding = tiny_llama.get_input_embeddings().weight
    parameters = sum(p.numel() * p.element_size() for p in tiny_llama.parameters())
    # Every weight, of the input embedding one row.
    assert result.sides["dense"].touched.bytes_per_step == parameters - embedding.nbytes + embedding[0].nbytes
    # The model is as it was: its own forward, which trains as before.
    assert native_forward_of(tiny_llama) is None


def test_a_family_without_the_native_step_says_why() -> None:
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config).train()
    result = decode_speed(model, _tokens(), prompt_tokens=_PROMPT, rounds=1)
    assert list(result.sides) == ["dense"]
    assert result.sides["dense"].path == "transformers"
    assert result.native_problem
    assert model.training


@native_only
def test_something_that_stops_the_native_step_shows(converted: PreTrainedModel) -> None:
    converted.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    result = decode_speed(converted, _tokens(), prompt_tokens=_PROMPT, rounds=1)
    assert {side.path for side in result.sides.values()} == {"transformers"}


def test_bad_input_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(SparsifyError, match=r"\[batch, tokens\], not of shape \[6\]"):
        decode_speed(tiny_llama, _tokens()[0, :6], prompt_tokens=2)
    with pytest.raises(SparsifyError, match="at least 1, not 6, 0 and 5"):
        decode_speed(tiny_llama, _tokens(length=_PROMPT + WARM_UP_STEPS), prompt_tokens=_PROMPT)
    with pytest.raises(SparsifyError, match="at least 1, not 6, 5 and 0"):
        decode_speed(tiny_llama, _tokens(), prompt_tokens=_PROMPT, rounds=0)
    with pytest.raises(SparsifyError, match="70 tokens are more than this model's 64 positions"):
        decode_speed(tiny_llama, _tokens(length=70), prompt_tokens=_PROMPT)


def test_every_side_is_fed_the_same_tokens(rows: PreTrainedModel, converted: PreTrainedModel) -> None:
    tokens, fed = _tokens(), []
    handles = [
        model.register_forward_pre_hook(
            lambda _m, _a, kwargs: fed.append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        for model in (rows, converted)
    ]
    with prepared(converted, rows):
        for side in sides_of(converted, rows):
            fed.clear()
            seconds = decode(side, tokens, _PROMPT).seconds
            assert torch.equal(torch.cat(fed, dim=1), tokens)
            assert len(seconds) == tokens.shape[1] - _PROMPT
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("batch", [1, 3])
def test_counts_are_those_of_the_steps(batch: int, converted: PreTrainedModel) -> None:
    tokens = _tokens(batch)
    side = Side("sparse", "", converted, "native", run_dense=False)
    counted = count(side, tokens, _PROMPT)
    # The prompt runs sparse too, so one forward over everything sees the same inputs; its prompt is left out here.
    kept: dict[str, list[torch.Tensor]] = {}
    layers = sparse_layers(converted)
    handles = [_record(layer, kept.setdefault(name, [])) for name, layer in layers.items()]
    with torch.inference_mode():
        converted(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, parts in kept.items():
        steps = parts[0][:, _PROMPT:]
        assert counted.token[name] == pytest.approx(float(steps.float().mean()), abs=0.01)
        assert counted.step[name] == pytest.approx(float(steps.any(0).float().mean()), abs=0.01)
    if batch == 1:
        assert counted.step == pytest.approx(counted.token)


def _record(layer: Any, into: list[torch.Tensor]) -> Any:
    return layer.register_forward_pre_hook(lambda _, args: into.append(args[0].abs() > layer.threshold))


def test_realised_density_is_not_counted_in_timed_rounds(
    converted: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked_while_timed = []

    def timed(side: Side, tokens: torch.Tensor, prompt_tokens: int, **options: Any) -> Any:
        layers = [m for m in side.model.modules() if isinstance(m, SparseLinear)]
        hooked_while_timed.append(any(layer._forward_pre_hooks for layer in layers))
        return decode(side, tokens, prompt_tokens, **options)

    monkeypatch.setattr(speed, "decode", timed)
    decode_speed(converted, _tokens(), prompt_tokens=_PROMPT, rounds=2)
    assert hooked_while_timed == [False] * 4


def test_a_failed_compilation_is_a_side_left_out(
    rows: PreTrainedModel, converted: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(forward: Any, mode: str | None) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no C++ compiler\nmore lines")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    result = decode_speed(converted, _tokens(), prompt_tokens=_PROMPT, rounds=1, rows=rows, compiled=True)
    assert result.left_out == {"compiled": "torch.compile failed: RuntimeError: no C++ compiler"}
    assert "compiled" not in result.sides


def test_a_compiled_side_runs_its_own_step(
    rows: PreTrainedModel, converted: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler itself takes half a minute: what it is given and how its result is used are tested without it.
    monkeypatch.setattr(torch, "compile", lambda forward, mode: forward)
    result = decode_speed(converted, _tokens(), prompt_tokens=_PROMPT, rounds=1, rows=rows, compiled=True)
    compiled = result.sides["compiled"]
    assert compiled.path == "compiled"
    assert compiled.logits_difference is not None
    assert compiled.logits_difference < 1e-4


def test_an_error_that_is_not_the_compilers_is_raised(converted: PreTrainedModel) -> None:
    with pytest.raises(IndexError):
        decode_speed(converted, _tokens() + 999, prompt_tokens=_PROMPT, rounds=1)


def test_a_copy_needs_room(tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = copy.deepcopy(tiny_llama)
    monkeypatch.setattr(sides_module, "available_memory", lambda device: 1 << 29)
    rows, reason = dense_copy(tiny_llama, lambda: made)
    assert rows is None
    assert "1.1 GB of free memory, 0.5 GB are there" in reason
    monkeypatch.setattr(sides_module, "available_memory", lambda device: None)
    assert dense_copy(tiny_llama, lambda: made) == (made, "")


def test_first_runs_are_short(converted: PreTrainedModel) -> None:
    with prepared(converted):
        side = sides_of(converted)[0]
        assert len(sides_module.first_run(side, _tokens(), _PROMPT).seconds) == CHECKED_STEPS
