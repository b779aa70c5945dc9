"""transformers' TrainingArguments of a finetuning, with the fields that the settings leave to the user."""

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sparsify.errors import SparsifyError, suggest
from sparsify.training.settings import FinetuneSettings

# Whether there are event files for TensorBoard depends on nothing else.
HAS_TENSORBOARD = find_spec("tensorboard") is not None


def training_arguments(settings: FinetuneSettings, state: Path) -> TrainingArguments:
    """Returns the arguments; with_steps completes them, once the number of processes is known.

    Raises SparsifyError for a field in settings.trainer that there is not, that a setting has, or that transformers
    refuses.
    """
    ours: dict[str, Any] = {
        "output_dir": str(state),
        "max_steps": 1,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_schedule,
        "weight_decay": settings.weight_decay,
        "bf16": settings.precision == "bf16",
        "save_steps": settings.checkpoint_every,
        "seed": settings.seed,
        "disable_tqdm": True,
        # A loss that is not finite ends the run; it must not be left out of a mean.
        "logging_nan_inf_filter": False,
    }
    known = {field.name for field in fields(TrainingArguments) if field.init}
    if settings.gradient_checkpointing:
        # Renamed in transformers 5; the old name warns there.
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        # The reentrant kind does not pass gradients to what is read inside a block, which the L1 term is.
        ours |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    defaults: dict[str, Any] = {
        "adam_beta2": 0.95,
        "save_total_limit": 2,
        "report_to": ["tensorboard"] if HAS_TENSORBOARD else [],
        "use_cpu": settings.device == "cpu" or not torch.accelerator.is_available(),
    }
    for name in settings.trainer:
        if name in ours or name in ("logging_steps", "warmup_steps", "num_train_epochs"):
            raise SparsifyError(
                f"trainer: {name} has a setting of its own, see `sparsify finetune --help`: leave it out"
            )
        if name not in known:
            raise SparsifyError(
                f"trainer: {name!r} is no field of transformers' TrainingArguments.{suggest(name, known)}"
            )
    try:
        return TrainingArguments(**(defaults | settings.trainer | ours))
    except (ValueError, TypeError, ImportError) as problem:
        raise SparsifyError(f"transformers refuses these settings: {' '.join(str(problem).split())}") from problem


def with_steps(arguments: TrainingArguments, settings: FinetuneSettings, steps: int) -> TrainingArguments:
    """Sets what depends on the number of steps, in place."""
    arguments.max_steps, arguments.warmup_steps = steps, round(settings.warmup * steps)
    arguments.logging_steps = settings.log_every or max(1, min(10, steps // 20))
    return arguments
