"""Finetuning a tiny model: what it optimises, what stops it, what it goes on from, and what it leaves behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsify.errors import SparsifyError
from sparsify.models import load_dense, load_tokenizer
from sparsify.relufication import relufy
from sparsify.training.checkpoints import newest_checkpoint
from sparsify.training.finetune import Finetuned
from sparsify.training.packing import PackedText, Source
from sparsify.training.trainer import Moment

Train = Callable[..., Finetuned]


def _weights(done: Finetuned) -> dict[str, Tensor]:
    return load_file(done.folder / "model.safetensors")


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_result_is_a_relu_model_of_stock_transformers(train: Train) -> None:
    moments: list[Moment] = []
    done = train(see=moments.append)
    assert (done.schedule.steps, done.tokens, done.resumed_from, done.main) == (6, 6 * 2 * 32, None, True)
    model: Any = AutoModelForCausalLM.from_pretrained(done.folder)
    assert model.config.hidden_act == "relu"
    assert isinstance(model.model.layers[0].mlp.act_fn, nn.ReLU)
    assert [moment.step for moment in moments] == [2, 4, 6]
    # The factor of the last update before the moment.
    assert [moment.factor for moment in moments] == pytest.approx([0.0, 0.05, 0.15])
    assert all(0.0 < share < 1.0 for moment in moments for share in moment.sparsity.values())
    logged = [entry for entry in done.history if "lm_loss" in entry]
    assert [entry["sparsity"] for entry in logged] == [moment.mean_sparsity for moment in moments]
    assert {"regulariser", "lambda", "tokens_per_second", "grad_norm", "learning_rate"} <= logged[0].keys()


def test_the_loss_is_the_papers(train: Train, tiny_dense: Path) -> None:
    """One step from known weights: the logged parts are those of the formula, for two micro-batches."""
    moments: list[Moment] = []
    train(stage_ends=[1, 2], factors=[0.3, 0.3], steps=2, accumulation=2, log_every=1, see=moments.append)
    model: Any = load_dense(str(tiny_dense), dtype="float32")
    relufy(model)
    source = Source("test", [f"{i}: the quick brown fox jumps over {i} lazy dogs" for i in range(40)])
    data = iter(PackedText(source, load_tokenizer(str(tiny_dense)), context=32, seed=0))
    tokens = torch.stack([next(data)["input_ids"] for _ in range(4)])
    inputs: list[Tensor] = []
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = model(tokens).logits
    lm = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    norm = sum(float(x.abs().mean()) for x in inputs)
    assert moments[0].lm_loss == pytest.approx(lm, rel=1e-5)
    assert moments[0].regulariser == pytest.approx(norm, rel=1e-5)
    assert moments[0].loss == pytest.approx(lm + 0.3 * norm, rel=1e-5)


def test_more_of_the_l1_term_leaves_more_zeros(train: Train) -> None:
    shares = {}
    for factor in (0.0, 5.0):
        moments: list[Moment] = []
        train(state=f"state{factor}", steps=40, factors=[factor] * 3, stage_ends=[2, 4, 40], see=moments.append)
        shares[factor] = moments[-1].mean_sparsity
    assert shares[5.0] > shares[0.0] + 0.1


def test_method_relu_has_no_l1_term_and_dense_keeps_the_activation(train: Train) -> None:
    losses = {}
    for method in ("relu", "dense"):
        moments: list[Moment] = []
        done = train(state=method, method=method, see=moments.append)
        assert all(moment.factor == 0.0 and moment.loss == pytest.approx(moment.lm_loss) for moment in moments)
        model: Any = AutoModelForCausalLM.from_pretrained(done.folder)
        losses[method] = model.config.hidden_act
    assert losses == {"relu": "relu", "dense": "silu"}
    assert all(share == 0.0 for share in moments[-1].sparsity.values())


def test_distillation_adds_the_divergence_to_the_teacher(train: Train, tiny_dense: Path) -> None:
    teacher = load_dense(str(tiny_dense), dtype="float32")
    moments: list[Moment] = []
    train(
        method="dense", distillation=0.5, teacher=teacher, learning_rate=1e-9, log_every=1, see=moments.append,
    )  # fmt: skip
    # The student is the teacher, as far as one step of a rate of 1e-9 moves it.
    assert moments[0].distillation == pytest.approx(0.0, abs=1e-6)
    assert moments[0].loss == pytest.approx(0.5 * moments[0].lm_loss, rel=1e-5)
    moments.clear()
    train(state="relu", method="relu", distillation=0.5, teacher=teacher, log_every=1, see=moments.append)
    first = moments[0]
    assert first.distillation is not None
    assert first.distillation > 1e-3
    assert first.loss == pytest.approx(0.5 * first.lm_loss + 0.5 * first.distillation, rel=1e-5)


def test_lora_trains_adapters_and_merges_them(train: Train, tiny_dense: Path) -> None:
    moments: list[Moment] = []
    done = train(lora_rank=4, see=moments.append)
    before = load_dense(str(tiny_dense), dtype="float32").state_dict()
    after: Any = AutoModelForCausalLM.from_pretrained(done.folder)
    assert after.config.hidden_act == "relu"
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "layers" in name and "norm" not in name}
    for name in changed:
        change = after.state_dict()[name] - before[name]
        assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) <= 4, name
    assert moments[-1].regulariser > 0.0


def test_gradient_checkpointing_trains_to_the_same_weights(train: Train) -> None:
    settings = {"precision": "bf16", "factors": [0.5] * 3}
    done = [train(state=str(on), gradient_checkpointing=on, **settings) for on in (False, True)]
    assert _same(_weights(done[0]), _weights(done[1]))
    assert all(tensor.dtype == torch.float32 for tensor in _weights(done[0]).values())


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4, "accumulation": 2}], ids=["weights", "lora"])
def test_a_stopped_run_goes_on_to_the_same_weights(train: Train, settings: dict[str, Any]) -> None:
    whole = train(state="whole", **settings)

    def stop(moment: Moment) -> None:
        if moment.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(state="stopped", see=stop, **settings)
    notes: list[str] = []
    again = train(state="stopped", note=notes.append, **settings)
    # The log comes before the checkpoint of the same step.
    assert again.resumed_from == 2
    assert any(note.endswith("checkpoint-2") for note in notes)
    assert _same(_weights(whole), _weights(again))
    assert [entry.get("lm_loss") for entry in again.history] == [entry.get("lm_loss") for entry in whole.history]
    # Nothing is left to train: the same folder gives the same answer.
    third = train(state="stopped", **settings)
    assert third.resumed_from == 6
    assert [entry.get("lm_loss") for entry in third.history] == [entry.get("lm_loss") for entry in whole.history]


def test_a_half_written_checkpoint_is_passed_over(train: Train, tmp_path: Path) -> None:
    done = train()
    state = tmp_path / "state"
    assert newest_checkpoint(state) == state / "checkpoint-6"
    (state / "checkpoint-6" / "trainer_state.json").write_text('{"log_his')
    assert newest_checkpoint(state) == state / "checkpoint-4"
    expected = _weights(done)
    done.folder.rename(state / "aside")
    again = train()
    assert again.resumed_from == 4
    assert _same(_weights(again), expected)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_with_the_last_good_checkpoint(
    train: Train, tiny_dense: Path, tmp_path: Path, where: str
) -> None:
    calls = 0

    def break_it(module: nn.Module, args: object, y: Tensor) -> Tensor:
        nonlocal calls
        calls += module.training
        if calls == 5:
            if where == "loss":
                return y * float("nan")
            y.register_hook(lambda gradient: gradient * float("inf"))
        return y

    def load() -> PreTrainedModel:
        model = load_dense(str(tiny_dense), dtype="float32")
        model.lm_head.register_forward_hook(break_it)
        return model

    with pytest.raises(
        SparsifyError, match=rf"the {where} is nan at step 5, with factor 0\.1: .*checkpoint-4 is the last"
    ):
        train(load=load)
    kept = load_file(tmp_path / "state" / "checkpoint-4" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())
    # It is a model to begin with, tokenizer and all.
    assert load_tokenizer(str(tmp_path / "state" / "checkpoint-4")).bos_token == "<s>"
    assert load_dense(str(tmp_path / "state" / "checkpoint-4")).config.hidden_act == "relu"
    assert not (tmp_path / "state" / "trained").exists()
    # With what broke it mended, it goes on from there.
    assert train().resumed_from == 4


def test_a_state_of_another_run_is_refused(train: Train, tmp_path: Path) -> None:
    train()
    with pytest.raises(
        SparsifyError, match=r"is the state of another run: seed, learning_rate differ|learning_rate, seed"
    ):
        train(seed=1, learning_rate=0.02)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(SparsifyError, match="is not a state folder of a finetuning"):
        train(state="other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_model_that_has_relu_already_is_trained_as_it_is(train: Train, tiny_dense: Path) -> None:
    def load() -> PreTrainedModel:
        model = load_dense(str(tiny_dense), dtype="float32")
        relufy(model)
        return model

    assert _same(_weights(train(state="a", load=load)), _weights(train(state="b")))


def test_models_that_cannot_be_relufied_are_refused(train: Train, tiny_dense: Path, tmp_path: Path) -> None:
    def without_mlp() -> PreTrainedModel:
        model: Any = load_dense(str(tiny_dense), dtype="float32")
        for block in model.model.layers:
            block.mlp = nn.Identity()
        return model  # type: ignore[no-any-return]

    def with_tanh() -> PreTrainedModel:
        model: Any = load_dense(str(tiny_dense), dtype="float32")
        for block in model.model.layers:
            block.mlp.act_fn = nn.Tanh()
        return model  # type: ignore[no-any-return]

    with pytest.raises(SparsifyError, match="no block of LlamaForCausalLM has an MLP"):
        train(load=without_mlp)
    with pytest.raises(SparsifyError, match="is Tanh, which has no ReLU counterpart"):
        train(state="tanh", load=with_tanh)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"learning_rate": 1.0}, "learning_rate has a setting of its own"),
        ({"adam_beta": 0.9}, "'adam_beta' is no field of transformers' TrainingArguments. Did you mean 'adam_beta"),
        ({"optim": "sdg"}, "transformers refuses these settings: .*sdg"),
    ],
)
def test_arguments_of_transformers_are_checked(train: Train, trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        train(trainer=trainer)


def test_event_files_for_tensorboard_have_the_same_numbers(train: Train, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train(trainer={})
    folder = next((tmp_path / "state" / "runs").iterdir())
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [entry for entry in done.history if "lm_loss" in entry]
    for name in ("lambda", "lm_loss", "regulariser", "sparsity", "sparsity/model.layers.1.mlp.down_proj"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in logged], rel=1e-6), name
