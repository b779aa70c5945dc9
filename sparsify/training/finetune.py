"""One finetuning: the ReLU swap, the trainer, its checkpoints, and the trained weights in a folder.

The state folder holds what a stopped run goes on from: run.json says whose it is, checkpoint-N are the trainer's, and
`trained` is an ordinary Hugging Face folder that appears whole when the last step is done. The same call with the same
folder goes on from the newest whole checkpoint, to the same weights on the same machine. Under `accelerate launch`
every process makes this call. Not covered: evaluation and the model card, which the `sparsify` command does.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.fingerprint import weights_sha256
from sparsify.mlp_targets import find_mlps
from sparsify.models import check_context, quiet, to_device
from sparsify.neuron_cut import Mlp
from sparsify.relu_layer import is_relu
from sparsify.relufication import relufy
from sparsify.strict import read_json
from sparsify.targets import find_targets
from sparsify.training.arguments import training_arguments, with_steps
from sparsify.training.checkpoints import newest_checkpoint
from sparsify.training.packing import PackedText, Source
from sparsify.training.regulariser import L1Regulariser
from sparsify.training.schedule import LambdaSchedule
from sparsify.training.settings import FinetuneSettings
from sparsify.training.trainer import Moment, SparseTrainer
from sparsify.whole_file import write_whole

TRAINED, HISTORY, _RUN = "trained", "history.json", "run.json"
# What a run may go on with another value of: where results go, what is measured, how often is said and saved what.
_FREE = (
    "about", "out", "state", "sparse_out", "shift", "shift_rise", "calibration", "evaluation", "eval_windows",
    "dtype", "device", "checkpoint_every", "log_every", "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class Finetuned:
    """Where the trained weights are, and what was logged (transformers' log_history); main: of several processes."""

    folder: Path
    schedule: LambdaSchedule
    tokens: int
    history: list[dict[str, Any]]
    resumed_from: int | None
    main: bool


def finetune(
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    settings: FinetuneSettings,
    state: Path,
    *,
    teacher: PreTrainedModel | None = None,
    see: Callable[[Moment], None] | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Finetuned:
    """Trains the fp32 model that load() returns, and returns where its weights are, in the state folder.

    Raises SparsifyError for a model that has no ReLU counterpart, a text too short, a state of another run, a loss
    that is not finite (the last whole checkpoint stays), and as settings.schedule does; UnavailableError where LoRA is
    asked for and peft is not installed.
    """
    model = load()
    check_context(model, settings.context)
    arguments = training_arguments(settings, state)
    schedule, per_step = settings.schedule(arguments.world_size), settings.tokens_per_step(arguments.world_size)
    with_steps(arguments, settings, schedule.steps)
    mlps = _mlps(model) if settings.method == "dense" else substitute(model)
    data = PackedText(source, tokenizer, context=settings.context, seed=settings.seed)
    next(iter(data))
    main, trained, tokens = arguments.process_index == 0, state / TRAINED, schedule.steps * per_step
    # All that can be wrong with the input is found by now: a refused run leaves no state.
    with arguments.main_process_first():
        if main:
            _claim(state, model, source, settings)
    if trained.is_dir():
        note(f"{trained} is there already: nothing is left to train")
        return Finetuned(trained, schedule, tokens, read_json(trained / HISTORY), schedule.steps, main)
    trainable, regulariser = _trainable(model, mlps, settings)
    trainer = SparseTrainer(
        model=trainable,
        args=arguments,
        train_dataset=data,
        regulariser=regulariser,
        schedule=schedule,
        teacher=None if teacher is None else to_device(teacher, str(arguments.device)).eval().requires_grad_(False),
        distillation=settings.distillation,
        tokens_per_step=per_step,
        tokenizer=tokenizer,
        see=see,
    )
    resumed = _run(trainer, state, note)
    _save(trainer, tokenizer, load if settings.lora_rank else None, settings, trained)
    return Finetuned(trained, schedule, tokens, trainer.state.log_history, resumed, main)


def substitute(model: PreTrainedModel) -> tuple[Mlp, ...]:
    """Puts ReLU into every MLP that has another activation, and returns the MLPs. Raises SparsifyError as relufy does.

    A model whose MLPs all have ReLU (OPT, or one that was reconstructed with `convert --method relufy`) stays as it is.
    """
    mlps = _mlps(model)
    if mlps and all(is_relu(model.get_submodule(mlp.activation)) for mlp in mlps):
        return mlps
    return relufy(model)


def _mlps(model: PreTrainedModel) -> tuple[Mlp, ...]:
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    return find_mlps(model, find_targets(model, tokens), tokens)


def _claim(state: Path, model: PreTrainedModel, source: Source, settings: FinetuneSettings) -> None:
    """Writes whose state this is, or checks that it is this run's. Raises SparsifyError where it is not."""
    values = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    about = {"weights_sha256": weights_sha256(model), "text": source.name, "settings": values}
    path = state / _RUN
    if path.is_file():
        found = read_json(path)
        known = found if isinstance(found, dict) else {}
        other = known.get("settings")
        old = other if isinstance(other, dict) else {}
        keys = [key for key in ("weights_sha256", "text") if known.get(key) != about[key]]
        keys += [name for name, value in values.items() if old.get(name) != json.loads(json.dumps(value))]
        if keys:
            raise SparsifyError(
                f"{state} is the state of another run: {', '.join(keys)} differ; give another --state, or remove it"
            )
        return
    if state.exists() and (not state.is_dir() or any(state.iterdir())):
        raise SparsifyError(f"{state} is not a state folder of a finetuning: give a new --state")
    try:
        state.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(about, indent=1) + "\n")
    except OSError as problem:
        raise UnavailableError(f"{state} cannot be written: {problem.strerror}") from None


def _trainable(model: PreTrainedModel, mlps: tuple[Mlp, ...], settings: FinetuneSettings) -> tuple[Any, L1Regulariser]:
    """Returns what is trained, the model or LoRA on every linear of its blocks, and what reads the inputs of down."""
    # LoRA begins at random, and the trainer sets the seed only after that.
    set_seed(settings.seed)
    trainable = _with_adapters(model, settings) if settings.lora_rank else model
    regulariser = L1Regulariser(settings.l1_reduction)
    # LoRA has put its own modules in the places of the linears.
    regulariser.attach({mlp.down: model.get_submodule(mlp.down) for mlp in mlps})
    return trainable, regulariser


def _with_adapters(model: PreTrainedModel, settings: FinetuneSettings) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as problem:
        raise UnavailableError("lora_rank needs the peft package: pip install 'sparsify-llm[train]'") from problem
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        target_modules=list(find_targets(model, torch.zeros(1, 8, dtype=torch.int64)).names),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _run(trainer: SparseTrainer, state: Path, note: Callable[[str], None]) -> int | None:
    """Trains to the end; returns the step that it went on from."""
    trainer.remove_callback(PrinterCallback)
    checkpoint = newest_checkpoint(state)
    if checkpoint is not None:
        note(f"going on from {checkpoint}")
    with quiet(), torch.enable_grad():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _save(
    trainer: SparseTrainer,
    tokenizer: PreTrainedTokenizerBase,
    base: Callable[[], PreTrainedModel] | None,
    settings: FinetuneSettings,
    trained: Path,
) -> None:
    """Writes the trained weights, with LoRA merged into what base() loads, so that the folder appears whole."""
    staged = trained.with_name(f".{trained.name}.partial")
    if trainer.is_world_process_zero():
        shutil.rmtree(staged, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(staged / "adapters" if base is not None else staged))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        with quiet():
            if base is not None:
                from peft import PeftModel

                model = base()
                if settings.method != "dense":
                    substitute(model)
                merged: Any = PeftModel.from_pretrained(model, str(staged / "adapters"))
                merged.merge_and_unload().save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / HISTORY).write_text(json.dumps(trainer.state.log_history) + "\n", encoding="utf-8")
        staged.rename(trained)
    trainer.accelerator.wait_for_everyone()
