"""The cells of a comparison by section, method and budget, with means and standard deviations over seeds.

A section is what may stand in one table: one model, text, protocol and way to calibrate. The dense cell has no
calibration and stands in every section that it fits.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparsify.evals.cells import Cell

DENSE = "dense"
BASELINE = "teal"


@dataclass(frozen=True)
class Spread:
    """A mean over seeds; std is the sample standard deviation, None for a single seed."""

    mean: float
    std: float | None
    seeds: int


@dataclass
class Entry:
    """One method at one budget: the cells with a result, one a seed, and the reasons of those that were refused."""

    method: str
    sparsity: float
    cells: list[Cell] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def spread(self, value: Callable[[Cell], float | None]) -> Spread | None:
        """Returns the spread of a value of the cells, None where none has it."""
        values = [v for cell in self.cells if (v := value(cell)) is not None]
        if not values:
            return None
        # An infinite perplexity has a mean, and no deviation.
        finite = len(values) > 1 and all(map(math.isfinite, values))
        return Spread(statistics.fmean(values), statistics.stdev(values) if finite else None, len(values))


@dataclass
class Section:
    """The entries of one table, by method and budget; key holds what all their cells share."""

    key: dict[str, Any]
    dense: Cell | None = None
    entries: dict[tuple[str, float], Entry] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _ in self.entries))

    @property
    def sparsities(self) -> list[float]:
        return sorted({sparsity for _, sparsity in self.entries})

    @property
    def seeds(self) -> int:
        """The most seeds that any entry has, refused ones too."""
        return max((len(e.cells) + len(e.refused) for e in self.entries.values()), default=0)

    def spread(self, method: str, sparsity: float, value: Callable[[Cell], float | None]) -> Spread | None:
        """Returns Entry.spread, None where there is no such entry."""
        entry = self.entries.get((method, sparsity))
        return entry.spread(value) if entry is not None else None

    def log_rise(self, cell: Cell) -> float | None:
        """Returns ln(perplexity) − ln(dense perplexity), None without the dense cell."""
        return nll(cell) - nll(self.dense) if self.dense is not None else None

    def ratio_to_teal(self, method: str, sparsity: float) -> float | None:
        """Returns the mean rise over TEAL's at the same sparsity, None where one is missing or TEAL's is not > 0."""
        own = self.spread(method, sparsity, self.log_rise)
        teal = self.spread(BASELINE, sparsity, self.log_rise)
        return own.mean / teal.mean if own is not None and teal is not None and teal.mean > 0 else None


def sections(cells: list[Cell]) -> list[Section]:
    """Returns the sections in the order in which their first cells were measured."""
    dense = {_identity(_shared(cell)): cell for cell in cells if cell["key"]["method"] == DENSE}
    found: dict[str, Section] = {}
    for cell in cells:
        key = cell["key"]
        if key["method"] == DENSE:
            continue
        about = {name: value for name, value in key["calibration"].items() if name != "sha256"}
        shared = _shared(cell)
        baseline = dense.get(_identity(shared))
        section = found.setdefault(_identity(shared | about), Section(shared | {"calibration": about}, baseline))
        entry = section.entries.setdefault((key["method"], key["sparsity"]), Entry(key["method"], key["sparsity"]))
        if "result" in cell:
            entry.cells.append(cell)
        else:
            entry.refused.append(cell["refused"])
    used = {id(section.dense) for section in found.values()}
    alone = [Section(_shared(cell) | {"calibration": None}, cell) for cell in dense.values() if id(cell) not in used]
    return [*found.values(), *alone]


def nll(cell: Cell) -> float:
    """The mean negative log-likelihood in nats per scored token."""
    return float(cell["result"]["quality"]["nll_per_token"])


def perplexity(cell: Cell) -> float:
    return float(cell["result"]["quality"]["perplexity"])


def kl(cell: Cell) -> float:
    """Mean KL(dense ‖ sparse) in nats per scored token."""
    return float(cell["result"]["divergence"]["kl"])


def top1_agreement(cell: Cell) -> float:
    """The share of scored tokens for which the dense and the sparse model put the same token first."""
    return float(cell["result"]["divergence"]["top1_agreement"])


def realised_sparsity(cell: Cell) -> float:
    return float(cell["result"]["realised_sparsity"])


def generated(name: str) -> Callable[[Cell], float | None]:
    """Returns what reads one number of the generation check, None from a cell without one."""
    return lambda cell: float(cell["generation"][name]) if "generation" in cell else None


def _shared(cell: Cell) -> dict[str, Any]:
    own = ("method", "sparsity", "seed", "calibration")
    return {name: value for name, value in cell["key"].items() if name not in own}


def _identity(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)
