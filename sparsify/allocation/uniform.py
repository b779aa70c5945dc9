"""The same share of bytes for every linear, or what the method's recipe says: the published default everywhere."""

from dataclasses import dataclass

from sparsify.allocation import Choices, Needs, Problem, Size, Work

SUMMARY = "the same share of bytes for every linear"
PAPER = "the default of arXiv 2408.14690, 2504.19449 and 2505.19427"


@dataclass(frozen=True)
class Uniform:
    """Leaves the method's sparsity as it is."""

    @property
    def name(self) -> str:
        return "uniform"

    @property
    def needs(self) -> Needs:
        return "shapes"

    def choices(self, problem: Problem) -> Choices:
        return {name: problem.method.candidates(name, shape) for name, shape in problem.shapes.items()}

    def work(self, size: Size) -> Work:
        return Work()


ALLOCATION = Uniform
