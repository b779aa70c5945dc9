"""How one byte budget is spent over a model's linears, one file each; the file name is the allocation's name.

An allocation returns the candidates of each linear that the conversion fits and compares. It asks the method what
that would do with a share of a linear's bytes (`offers`), so every allocation works with every threshold method.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, Protocol

from transformers import PreTrainedModel

from sparsify.budget import Candidate, LinearShape
from sparsify.calibration import Calibration, Progress
from sparsify.errors import SparsifyError, suggest
from sparsify.methods import AnyMethod, Method
from sparsify.trial import TargetLinear

Choices = dict[str, tuple[Candidate, ...]]
Needs = Literal["shapes", "block", "model"]


@dataclass(frozen=True)
class Size:
    """What the cost of an allocation depends on: linears and blocks of the model, linears with several candidates, the
    most candidates of one, calibration windows, and the sparsity that is asked for."""

    linears: int
    blocks: int
    chosen: int
    candidates: int
    windows: int
    sparsity: float


@dataclass(frozen=True)
class Work:
    """The cost of choices, in forwards of one calibration window through the whole model.

    forwards: without the head; heads: of these, the ones that go on to logits, forward or backward; products: with
    weights in fp32, as errors by R = W − L are measured; counted: of the scores of every linear; decompositions: of
    each linear that has ranks, its largest; batch: windows at once; sampled: errors of a linear's candidate that are
    measured on 512 of a batch's tokens and 256 gradients.
    """

    forwards: float = 0.0
    heads: float = 0.0
    products: float = 0.0
    counted: float = 0.0
    decompositions: float = 0.0
    batch: int = 1
    sampled: float = 0.0


@dataclass(frozen=True)
class Problem:
    """What an allocation works on: a dense model, its targets in module order, a bound method and calibration text."""

    model: PreTrainedModel
    method: Method
    shapes: Mapping[str, LinearShape]
    linears: Mapping[str, TargetLinear]
    calibration: Calibration
    progress: Progress | None = None

    def offers(self, name: str, share: float) -> tuple[Candidate, ...]:
        """Returns what the method offers for a share in (0, 1] of the linear's dense bytes; 1 is the dense linear."""
        method = replace(self.method, sparsity=1.0 - share)
        return method.candidates(name, self.shapes[name])

    def least_shares(self) -> dict[str, float]:
        """Returns the smallest share that an allocation may give a linear: overhead, and a tenth of uniform's rest."""
        uniform = 1.0 - self.method.sparsity
        least = {}
        for name, shape in self.shapes.items():
            offers = self.offers(name, uniform)
            scaled, compensated = any(c.scaled for c in offers), any(c.compensated for c in offers)
            overhead = shape.overhead_bytes(scaled=scaled, compensated=compensated) / shape.dense_bytes
            least[name] = overhead + 0.1 * (uniform - overhead)
        return least

    def report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


class Allocation(Protocol):
    """What a conversion needs of an allocation."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs:
        """What `choices` looks at: the linears' shapes alone, one block after the other, or the whole model at once."""
        ...

    def choices(self, problem: Problem) -> Choices:
        """Returns each linear's candidates, the preferred of equals first; any choice of one each meets the budget."""
        ...

    def work(self, size: "Size") -> "Work":
        """Returns what `choices` costs for a model of that size."""
        ...


@dataclass(frozen=True)
class AllocationInfo:
    """An allocation as the user sees it."""

    name: str
    summary: str
    paper: str
    config_class: type[Allocation]


@cache
def available() -> dict[str, AllocationInfo]:
    """Returns every allocation of this installation by name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found[info.name] = AllocationInfo(info.name, module.SUMMARY, module.PAPER, module.ALLOCATION)
    return found


def get_allocation(name: str) -> Allocation:
    """Returns an allocation with its defaults. Raises SparsifyError with the nearest name for an unknown one."""
    known = available()
    if name not in known:
        raise SparsifyError(f"unknown allocation {name!r}: available are {', '.join(known)}.{suggest(name, known)}")
    return known[name].config_class()


def allocation_of(asked: Allocation | str | None, method: AnyMethod) -> Allocation:
    """Returns the allocation that is asked for; for None the method's own default, uniform where it has none."""
    if asked is None:
        asked = str(getattr(method, "default_allocation", "uniform"))
    return get_allocation(asked) if isinstance(asked, str) else asked


def nearest(options: tuple[Candidate, ...], kind: Candidate) -> Candidate:
    """Returns the option with the score of kind and the nearest rho; any score where none has that one."""
    same = [option for option in options if option.score == kind.score] or list(options)
    return min(same, key=lambda option: abs(option.rho - kind.rho))


def refuse_token_cuts(allocation: str, problem: Problem) -> None:
    """Raises SparsifyError where the method has no threshold to trade bytes by: its cut depends on the token."""
    share = 1.0 - problem.method.sparsity
    if any(candidate.cut is not None for name in problem.shapes for candidate in problem.offers(name, share)):
        raise SparsifyError(
            f"allocation {allocation} moves bytes by thresholds that all tokens share, and method "
            f"{problem.method.name} cuts each token by itself: use allocation uniform, or another method"
        )


def refuse_recipe(allocation: str, problem: Problem) -> None:
    """Raises SparsifyError where the method's own recipe already says what each linear gets."""
    if getattr(problem.method, "recipe", None) is not None:
        raise SparsifyError(
            f"allocation {allocation} chooses each linear's share, and so does the recipe: leave one of them out"
        )
