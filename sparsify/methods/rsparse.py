"""R-Sparse: the channels that contribute most, and a low-rank product for all the others (arXiv 2504.19449).

y = W (m⊙x) + L ((1−m)⊙x), L = U_r S_r V_rᵀ the truncated SVD of W, m_j = 1[|x_j|·c_j > t], c the row norms of
V·diag(S), which are the column norms of W. A linear's budget is divided by rho: that share for channels, the rest for
the rank. The paper takes rho = 0.95 everywhere or searches it; here the default is the rho of a small grid with the
least output error on calibration text, linear by linear, at equal bytes. The
paper's evolutionary search is sparsify/allocation/evolutionary.py.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from sparsify.budget import Candidate, LinearShape, Score, check_flag, check_share, split_budget
from sparsify.errors import SparsifyError, suggest
from sparsify.low_rank import check_svd
from sparsify.methods import Facts
from sparsify.strict import read_json, read_yaml

SUMMARY = "column-norm channels plus a low-rank product for the rest, rho per linear from calibration error"
PAPER = "Zhang et al. 2025, arXiv 2504.19449"
FACTS = Facts(
    sparsifies="the input channels of every linear",
    choice="per-token",
    rule="fixed threshold; a low-rank product for what is below it",
    tensor_parallel=True,
    kernels=("reference", "native", "triton"),
)

RhoScore = Literal["column-norm", "magnitude", "residual-norm", "published-code", "auto"]
Recipe = Mapping[str, Mapping[str, float]]

# Equals go to the first: the plain channels need no factors.
RHO_GRID = (1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True)
class RSparse:
    """R-Sparse at one sparsity.

    rho: share of the budget for channels, in [0, 1], or "auto", chosen per linear. score: the paper's "column-norm",
    TEAL's "magnitude", "residual-norm" (the column norms of W − L, what dropping a channel really costs),
    "published-code", which takes the magnitude where rho is 1 as the public code does, or "auto", which offers all.
    recipe: a file of per-linear (sparsity, rho) or the mapping {linear: {"sparsity": s, "rho": rho}}; linears that a
    mapping does not name take `sparsity` and `rho`. compensate: give the mean of what neither channels nor low rank
    bring back as a bias (docs/allocation.md).
    """

    sparsity: float
    rho: float | str = "auto"
    score: str = "column-norm"
    recipe: Recipe | str | None = None
    compensate: bool = False
    svd: str = "auto"

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity, one_allowed=False)
        check_flag("compensate", self.compensate)
        check_svd(self.svd)
        if self.rho != "auto":
            if isinstance(self.rho, str):
                raise SparsifyError(f"rho is {self.rho!r}: it must be a number in [0, 1] or 'auto'")
            check_share("rho", self.rho, one_allowed=True)
        allowed = get_args(RhoScore)
        if self.score not in allowed:
            raise SparsifyError(
                f"unknown score {self.score!r}: allowed are {', '.join(allowed)}.{suggest(self.score, allowed)}"
            )

    @property
    def name(self) -> str:
        return "rsparse"

    def bind(self, shapes: Mapping[str, LinearShape]) -> Self:
        bound = self
        if self.recipe is not None:
            recipe = read_recipe(self.recipe, list(shapes)) if isinstance(self.recipe, str) else self.recipe
            bound = replace(self, recipe=_checked_recipe(recipe, list(shapes)))
        bound._check_ranks(shapes)
        return bound

    def candidates(self, name: str, shape: LinearShape) -> tuple[Candidate, ...]:
        sparsity, rho = self._share(name)
        rhos = RHO_GRID if rho == "auto" else (float(rho),)
        found: dict[tuple[int, Score], Candidate] = {}
        for value in rhos:
            for score in self._scores(value):
                candidate = split_budget(
                    name, shape, sparsity=sparsity, rho=value, score=score, compensated=self.compensate
                )
                found.setdefault((candidate.rank, score), candidate)
        return tuple(found.values())

    def _share(self, name: str) -> tuple[float, float | str]:
        if isinstance(self.recipe, Mapping) and name in self.recipe:
            return self.recipe[name]["sparsity"], self.recipe[name]["rho"]
        return self.sparsity, self.rho

    def _scores(self, rho: float) -> tuple[Score, ...]:
        if self.score == "auto":
            # Without a rank the residual is the weight.
            return ("magnitude", "column-norm") if rho == 1.0 else ("magnitude", "column-norm", "residual-norm")
        if self.score == "residual-norm":
            return ("residual-norm",)
        if self.score == "magnitude" or (self.score == "published-code" and rho == 1.0):
            return ("magnitude",)
        return ("column-norm",)

    def _check_ranks(self, shapes: Mapping[str, LinearShape]) -> None:
        if self.rho == "auto" or float(self.rho) == 1.0 or self.recipe is not None or self.sparsity == 0.0:
            return
        if not any(candidate.rank for name, shape in shapes.items() for candidate in self.candidates(name, shape)):
            raise SparsifyError(
                f"the budget is too small for a rank: at sparsity {self.sparsity}, rho {self.rho} no linear has room "
                "for even rank 1; use a smaller rho, a lower sparsity, rho 1 or rho auto"
            )


def read_recipe(path: str, names: list[str]) -> Recipe:
    """Reads per-linear shares: JSON or YAML {linear: {sparsity, rho}}, or the published text form.

    The published form (`np.savetxt` in a file called .npy or .txt) is the flat list rho, sparsity, rho, sparsity, …
    over the linears in module order: q, k, v, o, gate, up, down of block 0, then block 1, …
    """
    file = Path(path)
    if not file.is_file():
        raise SparsifyError(f"recipe {path} is not a file: give JSON or YAML by linear, or the published text form")
    if file.suffix in (".json", ".yaml", ".yml"):
        return _read_mapping(file)
    try:
        with warnings.catch_warnings():
            # An empty file: the count below says so.
            warnings.simplefilter("ignore", UserWarning)
            values = np.loadtxt(file, dtype=np.float64).ravel().tolist()
    except ValueError as problem:
        raise SparsifyError(f"recipe {path} is not a list of numbers: {problem}") from None
    if len(values) != 2 * len(names):
        raise SparsifyError(
            f"recipe {path} has {len(values)} numbers, this model needs {2 * len(names)}: "
            f"rho and sparsity of each of its {len(names)} linears"
        )
    pairs = zip(values[::2], values[1::2], strict=True)
    return {name: {"rho": rho, "sparsity": sparsity} for name, (rho, sparsity) in zip(names, pairs, strict=True)}


def _read_mapping(file: Path) -> Recipe:
    data: Any = read_json(file) if file.suffix == ".json" else read_yaml(file)
    if not isinstance(data, dict):
        raise SparsifyError(f"recipe {file} must map linear names to {{sparsity, rho}}, found {type(data).__name__}")
    return data


def _checked_recipe(recipe: Recipe, names: list[str]) -> Recipe:
    for name, entry in recipe.items():
        if name not in names:
            raise SparsifyError(
                f"the recipe names {name!r}, which this model does not have.{suggest(str(name), names)}"
            )
        if not isinstance(entry, Mapping) or set(entry) != {"sparsity", "rho"}:
            raise SparsifyError(f"the recipe must give {name} exactly 'sparsity' and 'rho', found {entry!r}")
        check_share(f"sparsity of {name} in the recipe", entry["sparsity"], one_allowed=False)
        check_share(f"rho of {name} in the recipe", entry["rho"], one_allowed=True)
    return {name: dict(entry) for name, entry in recipe.items()}


METHOD = RSparse
