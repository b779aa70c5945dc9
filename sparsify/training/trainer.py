"""transformers' Trainer with the loss of ProSparse: language model, L1 term with its scheduled factor, distillation.

L = (1 − w)·L_lm + w·KL(teacher ‖ student) + λ(t)·Σ_layers ‖x₁‖ (arXiv 2402.13516 section 3.2; the KL term is ours, w
is 0 without a teacher). Everything else is transformers' and accelerate's: optimiser, precision, processes,
checkpoints. Not covered: several GPUs in one process (nn.DataParallel); start one process a GPU with accelerate.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from sparsify.errors import SparsifyError
from sparsify.training.checkpoints import newest_checkpoint
from sparsify.training.regulariser import L1Regulariser
from sparsify.training.schedule import LambdaSchedule


@dataclass(frozen=True)
class Moment:
    """What is known at a logged step: means since the last one. lm_loss and regulariser are without their factors."""

    step: int
    steps: int
    loss: float
    lm_loss: float
    regulariser: float
    factor: float
    distillation: float | None
    learning_rate: float
    sparsity: dict[str, float]
    tokens: int
    tokens_per_second: float
    seconds_left: float

    @property
    def mean_sparsity(self) -> float | None:
        """The mean over layers of the shares of zeros that enter down."""
        return sum(self.sparsity.values()) / len(self.sparsity) if self.sparsity else None


class SparseTrainer(Trainer):
    """The Trainer with the L1 term; see: called with the Moment of each logged step, on the main process.

    Raises SparsifyError, in train(), for a loss or a gradient that is not finite, before it reaches the weights.
    """

    def __init__(
        self,
        *,
        regulariser: L1Regulariser,
        schedule: LambdaSchedule,
        teacher: PreTrainedModel | None = None,
        distillation: float = 0.0,
        tokens_per_step: int,
        tokenizer: PreTrainedTokenizerBase,
        see: Callable[[Moment], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data_collator=default_data_collator, **options)
        if self.args.n_gpu > 1:
            raise SparsifyError(
                f"{self.args.n_gpu} GPUs in one process are not supported: start with `accelerate launch -m "
                "sparsify.cli.main finetune ...`, one process a GPU, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        # Every window is full, so that means of means are means; the other terms are means of micro-batches, too.
        self.model_accepts_loss_kwargs = False
        self._regulariser, self._schedule = regulariser, schedule
        self._teacher, self._distillation = teacher, distillation
        self._tokens_per_step, self._see = tokens_per_step, see
        self._sums = torch.zeros(4)
        self._clock = _Clock()
        self.add_callback(self._clock)
        self.add_callback(_TokenizerSaver(tokenizer))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of one micro-batch, and with return_outputs the model's outputs."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._regulariser.collecting():
            outputs = model(**inputs)
        loss = lm_loss = outputs["loss"]
        kl = None
        if self._teacher is not None:
            kl = self._divergence(outputs["logits"], inputs)
            loss = (1.0 - self._distillation) * lm_loss + self._distillation * kl
        norm = self._regulariser.norm()
        factor = self._schedule.at(self.state.global_step)
        if norm is not None and factor > 0.0:
            loss = loss + factor * norm
        with torch.no_grad():
            nothing = torch.zeros((), device=lm_loss.device)
            one = torch.ones_like(nothing)
            found = [lm_loss.float(), nothing if norm is None else norm, nothing if kl is None else kl, one]
            self._sums = self._sums.to(lm_loss.device) + torch.stack(found)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Runs forward and backward of one micro-batch and refuses a loss that is not finite."""
        loss: Tensor = super().training_step(*args, **options)
        if not bool(torch.isfinite(loss)):
            raise self._diverged("loss", loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        # fp16's scaler skips such steps by itself.
        if norm is not None and not self.args.fp16 and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise self._diverged("gradient", norm)
        return norm

    def _diverged(self, what: str, value: Any) -> SparsifyError:
        step = self.state.global_step
        checkpoint = newest_checkpoint(Path(str(self.args.output_dir)))
        kept = "no checkpoint was written yet" if checkpoint is None else f"{checkpoint} is the last good checkpoint"
        return SparsifyError(
            f"the {what} is {float(value)} at step {step + 1}, with factor {self._schedule.at(step):g}: nothing was "
            f"updated, {kept}; try a smaller learning rate or peak factor with a new --state, and MODEL or that "
            "checkpoint to begin with"
        )

    def _divergence(self, logits: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Returns KL(teacher ‖ student) in nats, the mean over positions that have a next token."""
        assert self._teacher is not None
        with torch.no_grad(), self.compute_loss_context_manager():
            target = self._teacher(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        student = F.log_softmax(logits[:, :-1].float().flatten(0, 1), dim=-1)
        teacher = F.log_softmax(target[:, :-1].float().flatten(0, 1), dim=-1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, λ and the sparsity of each layer to what transformers logs, everywhere."""
        if "loss" in logs:
            moment = self._moment(logs)
            logs |= {
                "lm_loss": moment.lm_loss,
                "regulariser": moment.regulariser,
                "lambda": moment.factor,
                "tokens_per_second": moment.tokens_per_second,
            }
            if moment.distillation is not None:
                logs["distillation"] = moment.distillation
            if moment.mean_sparsity is not None:
                logs["sparsity"] = moment.mean_sparsity
                logs |= {f"sparsity/{name}": value for name, value in moment.sparsity.items()}
            if self._see is not None and self.is_world_process_zero():
                self._see(moment)
        super().log(logs, start_time)

    def _moment(self, logs: dict[str, float]) -> Moment:
        found = self._regulariser.take_sparsity()
        mine = torch.cat([self._sums.cpu(), torch.tensor(list(found.values()))])
        everywhere: Tensor = self.accelerator.reduce(mine.to(self.args.device), "mean").cpu()
        self._sums.zero_()
        lm_loss, norm, kl, count = everywhere[:4].tolist()
        step, steps = self.state.global_step, self.state.max_steps
        rate = self._clock.steps_per_second(step)
        return Moment(
            step=step,
            steps=steps,
            loss=logs["loss"],
            lm_loss=lm_loss / count,
            regulariser=norm / count,
            factor=self._schedule.at(step - 1),
            distillation=None if self._teacher is None else kl / count,
            learning_rate=logs["learning_rate"],
            sparsity=dict(zip(found, everywhere[4:].tolist(), strict=True)),
            tokens=step * self._tokens_per_step,
            tokens_per_second=rate * self._tokens_per_step,
            seconds_left=(steps - step) / rate if rate else 0.0,
        )


class _TokenizerSaver(TrainerCallback):
    """Puts the tokenizer into each checkpoint, so that it is a model to begin with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        if state.is_world_process_zero:
            self._tokenizer.save_pretrained(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


class _Clock(TrainerCallback):
    """Counts steps and time since this process began to train, and has the last step and each checkpoint logged."""

    def __init__(self) -> None:
        self._first_step, self._started = 0, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        self._first_step, self._started = state.global_step, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        # What was summed since the last log is in no checkpoint: a run that goes on would log the mean of the rest.
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def steps_per_second(self, step: int) -> float:
        return (step - self._first_step) / max(time.monotonic() - self._started, 1e-9)
