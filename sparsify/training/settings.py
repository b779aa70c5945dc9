"""The settings of a finetuning: every flag of `sparsify finetune`, from flags over YAML files over defaults.

The same document is written beside the result (finetune.yaml), so that a run can be repeated from it. Recipes are such
documents that come with the package; docs/finetune.md says where each of their numbers is from.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from sparsify.errors import SparsifyError, suggest
from sparsify.strict import from_mapping, read_settings
from sparsify.training.regulariser import Reduction
from sparsify.training.schedule import LambdaSchedule

Method = Literal["prosparse", "relu", "dense"]
AUTO = "auto"
_RECIPES = Path(__file__).parent / "recipes"
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


@dataclass(frozen=True)
class FinetuneSettings:
    """What one run is made from. Raises SparsifyError for values out of range.

    method: "prosparse", ReLU and the L1 term; "relu", ReLU alone; "dense", the model as it is, for the same tokens.
    tokens (a number or "2M") or steps: how long, the schedule's stages are scaled to it; the schedule's own length
    where both are None. stage_ends and factors: the schedule (sparsify.training.schedule); peak scales the factors so
    that the last one is it. l1_reduction: "mean" or "sum" (sparsify.training.regulariser). shift: t of FATReLU, or
    "auto", the largest that raises the perplexity on the calibration text by at most shift_rise. distillation: weight
    of the KL to the teacher, the model itself as it was where none is named. batch: windows of `context` tokens in a
    forward of one process, accumulation of which are a step. warmup: share of the steps. lora_rank 0: all weights are
    trained. log_every None: 10 steps, fewer in short runs. trainer: any other field of transformers' TrainingArguments.
    """

    about: str = ""
    model: str | None = None
    out: str | None = None
    state: str | None = None
    sparse_out: str | None = None
    method: Method = "prosparse"
    text: str | None = None
    tokens: int | str | None = None
    steps: int | None = None
    stage_ends: list[int] = field(default_factory=lambda: [5000, 6000, 10000, 12000, 16000, 16500])
    factors: list[int | float] = field(default_factory=lambda: [0.0, 0.005, 0.05, 0.05, 0.2, 0.2])
    peak: float | None = None
    l1_reduction: Reduction = "mean"
    shift: int | float | str = 0.01
    shift_rise: float = 0.005
    distillation: float = 0.0
    teacher: str | None = None
    context: int = 4096
    batch: int = 8
    accumulation: int = 1
    learning_rate: float = 3e-5
    lr_schedule: str = "cosine"
    warmup: float = 0.01
    weight_decay: float = 0.1
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: int | None = None
    checkpoint_every: int = 500
    log_every: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    calibration: str = "stdlib:calibration"
    evaluation: str | None = None
    eval_windows: int = 32
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["cpu"] | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 2), ("batch", 1), ("accumulation", 1), ("checkpoint_every", 1), ("log_every", 1),
            ("lora_rank", 0), ("eval_windows", 0), ("steps", 1), ("lora_alpha", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise SparsifyError(f"{name} is {value}: it must be at least {least}")
        for name, low, high in (("distillation", 0.0, 1.0), ("warmup", 0.0, 1.0), ("weight_decay", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise SparsifyError(f"{name} is {getattr(self, name)}: it must be in [{low:g}, {high:g}]")
        if not 0.0 < self.learning_rate < 1.0:
            raise SparsifyError(f"learning_rate is {self.learning_rate}: it must be between 0 and 1")
        for name in ("peak", "shift", "shift_rise"):
            value = getattr(self, name)
            if name == "shift" and value == AUTO:
                continue
            if value is not None and (isinstance(value, str) or not 0.0 <= value < math.inf):
                allowed = "a finite number of at least 0" + (f", or {AUTO}" if name == "shift" else "")
                raise SparsifyError(f"{name} is {value!r}: it must be {allowed}")
        if self.shift == AUTO and not self.eval_windows:
            raise SparsifyError("shift auto is measured: give eval_windows of at least 1, or a number")
        if self.tokens is not None and self.steps is not None:
            raise SparsifyError("tokens and steps are both given: they say the same, leave one out")
        if self.lora_alpha is not None and not self.lora_rank:
            raise SparsifyError("lora_alpha is for LoRA: give lora_rank, too")
        if self.teacher is not None and not self.distillation:
            raise SparsifyError("a teacher is for distillation: give its weight, such as 0.5, or leave the teacher out")
        self.token_count()
        self.stages()

    def updated(self, values: Mapping[str, Any], *, source: str) -> Self:
        """Returns the settings with these values; an unknown name or a wrong type is refused, naming the source."""
        return from_mapping(type(self), asdict(self) | dict(values), where=source)

    def token_count(self) -> int | None:
        """Returns the tokens to train on, None where the number of steps is given by steps or by the schedule."""
        if self.tokens is None or isinstance(self.tokens, int):
            count = self.tokens
        else:
            found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGB]?)", self.tokens.strip())
            if found is None:
                raise SparsifyError(f"tokens is {self.tokens!r}: give a number, such as 2000000, 2M or 1.5B")
            count = round(float(found[1]) * _UNITS[found[2]])
        if count is not None and count < 1:
            raise SparsifyError(f"tokens is {self.tokens}: it must be at least 1")
        return count

    def stages(self) -> LambdaSchedule:
        """Returns the schedule as it is written, not scaled. Raises SparsifyError for stages out of order."""
        return LambdaSchedule(tuple(self.stage_ends), tuple(float(factor) for factor in self.factors))

    def schedule(self, processes: int) -> LambdaSchedule:
        """Returns the schedule of this run over all its steps; 0 throughout for another method than prosparse.

        Raises SparsifyError for a budget that is less than one step, or has no room for the stages.
        """
        written = self.stages()
        steps, tokens = self.steps or written.steps, self.token_count()
        if tokens is not None:
            steps = tokens // self.tokens_per_step(processes)
            if not steps:
                raise SparsifyError(
                    f"{tokens} tokens are less than one step of {self.tokens_per_step(processes)}: give more tokens, "
                    "or a smaller context, batch or accumulation"
                )
        if self.method != "prosparse":
            return LambdaSchedule((steps,), (0.0,))
        return written.scaled(steps, self.peak)

    def tokens_per_step(self, processes: int) -> int:
        """Returns the tokens that one update sees."""
        return self.context * self.batch * self.accumulation * processes


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Returns the values of a recipe. Raises SparsifyError for a name that is none."""
    names = recipe_names()
    if name not in names:
        raise SparsifyError(f"unknown recipe {name!r}: there are {', '.join(names)}.{suggest(name, names)}")
    return read_settings(_RECIPES / f"{name}.yaml")


def check_method(name: str) -> None:
    """Raises SparsifyError for a method that there is not."""
    allowed = get_args(Method)
    if name not in allowed:
        raise SparsifyError(f"unknown method {name!r}: finetune has {', '.join(allowed)}.{suggest(name, allowed)}")
