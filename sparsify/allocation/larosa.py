"""LaRoSA's fixed split (arXiv 2507.01299): inputs of attention and MLP keep more channels than those of o and down.

The paper drops 0.8 p of the channels of q|k|v and gate|up and 1.2 p of those of o and down, and calls it sparsity p; by
bytes that is less (46% at "50%" on Llama-2-7B). Here p is solved for: channels, rotations and all else that a token
touches cost (1 − sparsity) of the dense bytes. Not covered: an o or down that would keep less than one channel keeps
one, and the others pay for it.
"""

from dataclasses import dataclass

from sparsify.allocation import Choices, Needs, Problem, Size, Work, refuse_recipe
from sparsify.budget import LinearShape
from sparsify.errors import SparsifyError

SUMMARY = "inputs of attention and MLP drop 0.8 p of their channels, those of o and down 1.2 p; p by the bytes"
PAPER = "LaRoSA, Liu et al. 2025, arXiv 2507.01299"

_READS, _WRITES = 0.8, 1.2
# Where the rotation costs more than a linear saves, it is still sparse: the linears of a site are rotated together.
_MOST = 1.0 - 1e-6


@dataclass(frozen=True)
class LarosaSplit:
    """The paper's coefficients, 0.8 and 1.2."""

    @property
    def name(self) -> str:
        return "larosa"

    @property
    def needs(self) -> Needs:
        return "shapes"

    def choices(self, problem: Problem) -> Choices:
        refuse_recipe(self.name, problem)
        sparsity = problem.method.sparsity
        if sparsity == 0.0:
            return {name: problem.offers(name, 1.0) for name in problem.shapes}
        overhead = {name: _overhead(problem, name) for name in problem.shapes}
        dense = {name: shape.dense_bytes for name, shape in problem.shapes.items()}
        budget = (1.0 - sparsity) * sum(dense.values())

        def shares(p: float) -> dict[str, float]:
            return {name: _share(shape, p, overhead[name]) for name, shape in problem.shapes.items()}

        def spent(p: float) -> float:
            return sum(share * dense[name] for name, share in shares(p).items())

        low, high = 0.0, 1.0 / _READS
        if spent(high) > budget:
            raise SparsifyError(
                f"sparsity {sparsity} leaves less than rotations, thresholds and one channel of each linear take: use "
                "a lower sparsity, or rotation 'model', which costs no bytes"
            )
        for _ in range(200):
            p = (low + high) / 2
            low, high = (p, high) if spent(p) > budget else (low, p)
        return {name: problem.offers(name, share) for name, share in shares(high).items()}

    def work(self, size: Size) -> Work:
        return Work()


def _overhead(problem: Problem, name: str) -> float:
    """Returns what the method stores besides channels and low rank, as a share of the linear's dense bytes."""
    offers, shape = problem.offers(name, _MOST), problem.shapes[name]
    scaled, compensated = any(c.scaled for c in offers), any(c.compensated for c in offers)
    rotation = shape.rotation_bytes if any(c.rotated for c in offers) else 0.0
    return (shape.overhead_bytes(scaled=scaled, compensated=compensated) + rotation) / shape.dense_bytes


def _share(shape: LinearShape, p: float, overhead: float) -> float:
    kept = 1.0 - (_READS if shape.site_outputs else _WRITES) * p
    return min(max(kept, (1.0 + 1e-9) / shape.inputs) + overhead, _MOST)


ALLOCATION = LarosaSplit
