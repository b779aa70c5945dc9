"""The sparsification methods, one file each; the file name is the method's name, with - for _.

A method is a frozen dataclass that says how each linear's byte budget may be spent (`candidates`); the conversion
measures the candidates on calibration text and keeps the best; or it names a cut of MLP neurons (`neuron_cut`).
A module with METHOD, SUMMARY, PAPER and FACTS is one.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from sparsify.budget import Candidate, LinearShape, Score, check_flag, check_share, split_budget
from sparsify.errors import SparsifyError, suggest
from sparsify.neuron_cut import NeuronCut


class Method(Protocol):
    """What a conversion needs of a method."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...

    @property
    def sparsity(self) -> float: ...

    def bind(self, shapes: Mapping[str, LinearShape]) -> Self:
        """Returns the method checked against, and completed for, the linears of one model."""
        ...

    def candidates(self, name: str, shape: LinearShape) -> tuple[Candidate, ...]:
        """Returns the ways to spend this linear's budget, the preferred of equals first."""
        ...


@runtime_checkable
class NeuronMethod(Protocol):
    """What a conversion needs of a method that chooses neurons of MLPs (sparsify.neuron_conversion)."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    neuron_cut: ClassVar[NeuronCut]

    @property
    def name(self) -> str: ...

    @property
    def sparsity(self) -> float: ...


AnyMethod = Method | NeuronMethod


def options_of(method: AnyMethod) -> dict[str, Any]:
    """Returns the values of a method's fields by name; not svd where it is auto, which an older sparsify refuses."""
    return {name: value for name, value in asdict(method).items() if (name, value) != ("svd", "auto")}


@dataclass(frozen=True)
class ChannelMethod:
    """A method that keeps channels by one score, all of each linear's budget in them, the same share in every linear.

    sparsity: share of each linear's weight bytes that a token does not touch, on average. compensate: give the mean of
    what is dropped back as a bias (docs/allocation.md). A method is a subclass with its name and its score.
    """

    sparsity: float
    compensate: bool = False

    name: ClassVar[str]
    score: ClassVar[Score] = "magnitude"

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        check_flag("compensate", self.compensate)

    def bind(self, shapes: Mapping[str, LinearShape]) -> Self:
        return self

    def candidates(self, name: str, shape: LinearShape) -> tuple[Candidate, ...]:
        split = split_budget(
            name, shape, sparsity=self.sparsity, rho=1.0, score=self.score, compensated=self.compensate
        )
        return (self.cut(name, shape, split),)

    def cut(self, name: str, shape: LinearShape, split: Candidate) -> Candidate:
        """Returns the candidate with the method's own cut; here the fixed threshold that the split stands for."""
        return split


@dataclass(frozen=True)
class Facts:
    """What a user has to know of a method before choosing it.

    sparsifies: which part of a model. choice: when it is settled what is skipped. rule: what settles it.
    tensor_parallel: whether devices that hold a part of a linear's input channels each choose as one device would,
    without an exchange. kernels: the backends that run it.
    """

    sparsifies: str
    choice: Literal["static", "per-prompt", "per-token"]
    rule: str
    tensor_parallel: bool
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class MethodInfo:
    """A method as the user sees it."""

    name: str
    summary: str
    paper: str
    facts: Facts
    config_class: type[AnyMethod]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options, as users give them."""
        return tuple(f.name for f in fields(self.config_class) if f.metadata.get("option", True))

    def configure(self, **options: Any) -> AnyMethod:
        """Returns the configured method. Raises SparsifyError for an option that it does not take or is missing."""
        for option in options:
            if option not in self.options:
                others = [name for name, info in available().items() if option in info.options]
                hint = f" {', '.join(others)} does." if others else suggest(option, self.options)
                raise SparsifyError(
                    f"method {self.name} takes no option {option!r}: it takes {', '.join(self.options)}.{hint}"
                )
        for field in fields(self.config_class):
            if field.name not in options and field.default is MISSING and field.default_factory is MISSING:
                raise SparsifyError(f"method {self.name} needs the option {field.name!r}")
        return self.config_class(**options)


@dataclass(frozen=True)
class CombinedInfo(MethodInfo):
    """relu with another method for the linears that ReLU does not settle."""

    others: MethodInfo

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().options, *self.others.options)))

    def configure(self, **options: Any) -> AnyMethod:
        own = {name: options.pop(name) for name in super().options if name in options and name != "sparsity"}
        others = self.others.configure(**options)
        make: Any = self.config_class
        combined: AnyMethod = make(sparsity=others.sparsity, others=others, **own)
        return combined


@cache
def available() -> dict[str, MethodInfo]:
    """Returns every method of this installation by name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        name = info.name.replace("_", "-")
        found[name] = MethodInfo(name, module.SUMMARY, module.PAPER, module.FACTS, module.METHOD)
    return found


def get_method(name: str) -> MethodInfo:
    """Returns a method by name, or two as relu+NAME. Raises SparsifyError with the nearest name for an unknown one."""
    methods = available()
    first, plus, second = name.partition("+")
    if plus:
        return _combined(name, get_method(first), get_method(second))
    if name not in methods:
        raise SparsifyError(f"unknown method {name!r}: available are {', '.join(methods)}.{suggest(name, methods)}")
    return methods[name]


def _combined(name: str, first: MethodInfo, second: MethodInfo) -> MethodInfo:
    if first.name != "relu" or hasattr(second.config_class, "neuron_cut"):
        raise SparsifyError(
            f"{name!r} cannot be combined: relu may stand before a method of channels, such as relu+teal or "
            "relu+rsparse"
        )
    kernels = tuple(kernel for kernel in first.facts.kernels if kernel in second.facts.kernels)
    facts = replace(
        first.facts,
        sparsifies=f"{first.facts.sparsifies}; of the other linears {second.facts.sparsifies}",
        rule=f"{first.facts.rule}; {second.facts.rule}",
        tensor_parallel=first.facts.tensor_parallel and second.facts.tensor_parallel,
        kernels=kernels,
    )
    return CombinedInfo(name, first.summary, f"{first.paper}; {second.paper}", facts, first.config_class, second)
