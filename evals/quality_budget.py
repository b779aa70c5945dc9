"""A budget as a quality: the sparsest conversion whose perplexity on held-out text rises by at most so much.

Every try converts dense weights anew, calibrates on one part of a text and measures on another, every token sparse.
The search halves the interval in which the rise reaches the limit. That a sparser model is a worse one is used to
choose the next try and is not relied on: the model that is returned was measured itself. A sparser one that is within
the limit by accident, beyond one that is not, is not looked for.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.allocation import Allocation
from sparsify.calibration import Calibration
from sparsify.conversion import convert
from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals.perplexity import perplexity
from sparsify.hold_out import HELD_OUT, REST
from sparsify.methods import AnyMethod, get_method
from sparsify.text import Windows, read_text, windows

TOLERANCE = 0.005
# No budget is looked for beyond this sparsity.
_MOST = 0.95

Note = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Try:
    """One conversion. increase: of perplexity over dense, a share; refused: why the method could not meet it."""

    sparsity: float
    perplexity: float | None
    increase: float | None
    within: bool
    refused: str | None = None


@dataclass(frozen=True)
class QualityBudget:
    """What was asked for and found. tries: in their order, the last is the returned model's."""

    max_increase: float
    tolerance: float
    sparsity: float
    increase: float
    dense_perplexity: float
    text: str
    tokens: int
    tries: tuple[Try, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_increase(value: object) -> float:
    """Returns a rise of perplexity as a share, from a number or text such as "1%" or "0.01".

    Raises SparsifyError for what is neither, 0 or below, or a number of 1 and more without a percent sign.
    """
    allowed = "give a share such as 1% or 0.01, above 0"
    text = str(value).strip()
    number = text.removesuffix("%")
    try:
        share = float(number) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        share = math.nan
    if isinstance(value, bool) or not math.isfinite(share) or share <= 0.0:
        raise SparsifyError(f"max-ppl-increase is {value!r}: {allowed}")
    if share >= 1.0 and not text.endswith("%"):
        raise SparsifyError(f"max-ppl-increase is {value!r}, which is {share:.0%}: {allowed}. Did you mean {number}%?")
    return share


def held_out_texts(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, sequences: int, seq_len: int, held_out: int
) -> tuple[Calibration, Windows]:
    """Returns calibration windows of the first three quarters of a text, and `held_out` windows of the last quarter.

    Raises SparsifyError where either part is too short.
    """
    if held_out < 1:
        raise SparsifyError(f"held_out is {held_out}: it must be at least 1 window")
    calibration = Calibration.from_text(read_text(spec + REST), tokenizer, sequences=sequences, seq_len=seq_len)
    found = windows(read_text(spec + HELD_OUT), tokenizer, seq_len=seq_len, limit=held_out)
    if len(found.tokens) < held_out:
        raise SparsifyError(
            f"the held-out quarter of calibration text {spec} gives {len(found.tokens)} windows of {seq_len} tokens, "
            f"{held_out} are asked for: use a longer text, --held-out {len(found.tokens)} or a shorter --seq-len"
        )
    return calibration, found


def convert_within(
    make: Callable[[], PreTrainedModel],
    method: AnyMethod,
    calibration: Calibration,
    held_out: Windows,
    *,
    max_increase: float,
    allocation: Allocation | str | None = None,
    rotate: bool = False,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
    note: Note | None = None,
) -> tuple[PreTrainedModel, QualityBudget]:
    """Returns the sparsest model found whose perplexity on held_out is at most (1 + max_increase) times dense.

    make: returns the dense model, a new one each time; only one is held at a time. method: at any sparsity, which the
    search sets. tolerance: of the sparsity. Raises SparsifyError for a limit that no sparsity of at least the tolerance
    keeps, and what the method refuses at every sparsity.
    """
    if not 0.0 < max_increase < math.inf:
        raise SparsifyError(f"max_increase is {max_increase}: it must be a share above 0")
    if not 0.0 < tolerance < 1.0:
        raise SparsifyError(f"the tolerance of the sparsity is {tolerance}: it must be in (0, 1)")
    search = _Search(make, method, calibration, held_out, max_increase, allocation, progress, note, rotate)
    while search.high - search.low > tolerance:
        search.attempt((search.low + search.high) / 2)
    model = search.best_model()
    last = search.tries[-1]
    assert last.increase is not None
    return model, QualityBudget(
        max_increase=max_increase,
        tolerance=tolerance,
        sparsity=last.sparsity,
        increase=last.increase,
        dense_perplexity=search.dense,
        text=held_out.name,
        tokens=held_out.tokens_scored,
        tries=tuple(search.tries),
    )


class _Search:
    """The tries so far, and the sparsities between which the limit lies."""

    def __init__(
        self,
        make: Callable[[], PreTrainedModel],
        method: AnyMethod,
        calibration: Calibration,
        held_out: Windows,
        max_increase: float,
        allocation: Allocation | str | None,
        progress: Progress | None,
        note: Note | None,
        rotate: bool,
    ) -> None:
        # A method that chooses by a prompt has a meaning in this protocol only.
        self.protocol = "decode" if get_method(method.name).facts.choice == "per-prompt" else "every-token"
        self.rotate = rotate
        self.make, self.method, self.allocation = make, method, allocation
        self.calibration, self.held_out, self.limit = calibration, held_out, max_increase
        self.progress, self.note = progress, note
        self.tries: list[Try] = []
        self.low, self.high = 0.0, _MOST
        self.model: PreTrainedModel | None = make()
        self.dense = self._perplexity(self.model, "held out, dense")

    def attempt(self, sparsity: float) -> Try:
        """Converts at one sparsity and measures; moves the interval."""
        self._drop()
        self.model = model = self.make()
        number = len(self.tries) + 1
        try:
            method = replace(self.method, sparsity=sparsity)
            stage = self._stages(f"try {number}")
            convert(model, method, self.calibration, allocation=self.allocation, rotate=self.rotate, progress=stage)
        except UnavailableError:
            raise
        except SparsifyError as problem:
            self.high = sparsity
            return self._seen(Try(sparsity, None, None, within=False, refused=str(problem)))
        found = self._perplexity(model, f"try {number}: held out")
        increase = found / self.dense - 1.0
        within = increase <= self.limit
        self.low, self.high = (sparsity, self.high) if within else (self.low, sparsity)
        return self._seen(Try(sparsity, found, increase, within))

    def _perplexity(self, model: PreTrainedModel, label: str) -> float:
        return perplexity(model, self.held_out, protocol=self.protocol, progress=self._stage(label)).perplexity

    def best_model(self) -> PreTrainedModel:
        """Returns the sparsest model within the limit, converted again where it is not there any more."""
        for candidate in sorted((t for t in self.tries if t.within), key=lambda t: t.sparsity, reverse=True):
            if self.tries[-1] == candidate or self.attempt(candidate.sparsity).within:
                assert self.model is not None
                return self.model
        if all(t.refused is not None for t in self.tries):
            raise SparsifyError(str(self.tries[-1].refused))
        least = min(self.tries, key=lambda t: t.sparsity)
        rise = "was refused" if least.increase is None else f"raises it by {least.increase:.2%}"
        raise SparsifyError(
            f"no sparsity keeps the rise of perplexity within {self.limit:.3%} on {self.held_out.name}: "
            f"{least.sparsity:.2%}, the least that was tried, {rise}; allow more, or use another method"
        )

    def _drop(self) -> None:
        """Lets go of the last try's model, which refers to itself, before the next one is made."""
        self.model = None
        gc.collect()

    def _seen(self, found: Try) -> Try:
        self.tries.append(found)
        if self.note is not None:
            said = "refused" if found.increase is None else f"perplexity {found.perplexity:.4f}, {found.increase:+.2%}"
            self.note(f"try {len(self.tries)}: sparsity {found.sparsity:.1%}, {said}")
        return found

    def _stage(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: None if self.progress is None else self.progress(name, done, total)

    def _stages(self, prefix: str) -> Progress:
        return lambda s, done, total: None if self.progress is None else self.progress(f"{prefix}: {s}", done, total)
