"""R-Sparse's evolutionary search of (s, rho) for each linear (arXiv 2504.19449, Algorithm 1), never released.

An individual has three genes a linear: a wish for bytes, rho and the score, of which the latter two only matter where
the method leaves them open. Wishes are scaled so that every individual costs the budget to the byte. As in the known
reproduction of the paper's search it is differential evolution: groups of 28 linears one after the other, 32
individuals, 5 generations; child = x1 + 0.5 (x2 − x3) for half of the genes, the parent's for the others, clipped; the
best of parents and children live on. A group starts from the best of now, from rho 1 at uniform shares, and from
random changes of the best, so that nothing ever gets worse on the text that is searched on.

Where we differ: sparsities move under one budget for all linears, fitness is by default the KL to the dense model in
place of the perplexity, and the text is the calibration's. Not covered: token cuts and recipes.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sparsify import __version__
from sparsify.allocation import Choices, Needs, Problem, Size, Work, refuse_recipe, refuse_token_cuts
from sparsify.budget import Candidate, fill_budget
from sparsify.calibration import ScoreHistogram, hooked
from sparsify.errors import SparsifyError, suggest
from sparsify.fingerprint import weights_sha256
from sparsify.methods import options_of
from sparsify.search_state import SearchState, check_state_file, read_state, write_state
from sparsify.trial import Trial, dense_log_probabilities, evaluating, kl_divergence, least_output_error

SUMMARY = "R-Sparse's evolutionary search over each linear's share and rho; hours on large models"
PAPER = "R-Sparse's Algorithm 1, Zhang et al. 2025, arXiv 2504.19449"

Objective = Literal["kl", "perplexity"]
Genes = NDArray[np.float64]

# Differential weight and the probability that a gene is the mutant's.
_WEIGHT, _CROSSOVER = 0.5, 0.5
# How far the first individuals lie from the best: ln of a wish, rho; and how often a score is drawn anew.
_WISH_SPREAD, _RHO_SPREAD, _NEW_SCORE = 0.25, 0.1, 0.25
_LEAST_WISH = 0.01
_WISH, _RHO, _SCORE = range(3)

_log = logging.getLogger("sparsify.allocation.evolutionary")


@dataclass(frozen=True)
class Evolutionary:
    """population: individuals; generations: of each group; group: linears that are searched together.

    windows: calibration windows that fitness is measured on; objective: "kl", nats a token to the dense model, or the
    paper's "perplexity"; state: a file to stop and go on with, written after each generation.
    """

    population: int = 32
    generations: int = 5
    group: int = 28
    windows: int = 4
    objective: str = "kl"
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        # A child is made from its parent and three others.
        for name, least in (("population", 4), ("generations", 0), ("group", 1), ("windows", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SparsifyError(f"{name} of allocation evolutionary is {value!r}: it must be an integer ≥ {least}")
        allowed = get_args(Objective)
        if self.objective not in allowed:
            raise SparsifyError(
                f"unknown objective {self.objective!r}: allowed are {', '.join(allowed)}."
                f"{suggest(str(self.objective), allowed)}"
            )
        if self.state is not None:
            check_state_file(Path(self.state))

    @property
    def name(self) -> str:
        return "evolutionary"

    @property
    def needs(self) -> Needs:
        return "model"

    def choices(self, problem: Problem) -> Choices:
        refuse_recipe(self.name, problem)
        refuse_token_cuts(self.name, problem)
        if problem.method.sparsity == 0.0:
            return {name: problem.offers(name, 1.0) for name in problem.shapes}
        with evaluating(problem.model), torch.inference_mode():
            best = _Search(self, problem).run()
        return {name: (candidate,) for name, candidate in best.items()}

    def work(self, size: Size) -> Work:
        """A sparse forward on the search's windows for each individual; residual norms, counted anew, are more."""
        if size.sparsity == 0.0:
            return Work()
        runs = float(self.windows * self.evaluations(size.linears))
        return Work(
            forwards=runs + self.windows,
            heads=runs + self.windows,
            products=float(1 + size.candidates) if size.chosen else 0.0,
            counted=2.0 * self.windows,
            decompositions=2.0 if size.chosen else 0.0,
        )

    def evaluations(self, linears: int) -> int:
        """Returns how many individuals are measured for a model with this many linears."""
        return -(-linears // self.group) * self.population * (1 + self.generations)


class _Search:
    """The search of one problem: its fitness, and the state that is written down."""

    def __init__(self, settings: Evolutionary, problem: Problem) -> None:
        self.settings, self.problem = settings, problem
        self.names = list(problem.shapes)
        self.least = problem.least_shares()
        self.trial = Trial(problem.model, problem.linears)
        self.tokens = problem.calibration.tokens[: settings.windows].to(problem.model.device)
        self.groups = [
            range(f, min(f + settings.group, len(self.names))) for f in range(0, len(self.names), settings.group)
        ]
        self.total = settings.evaluations(len(self.names))
        self.measured = 0

    def run(self) -> dict[str, Candidate]:
        state = self._resumed()
        self._observe()
        if state is None:
            state = SearchState(self._fingerprint(), self._start().tolist())
        self.measured = self.settings.population * len(state.history)
        for generation in self._remaining(state):
            group = self.groups[state.group]
            parents = np.array(state.population).reshape(-1, len(group), 3)
            random = np.random.default_rng([self.settings.seed, state.group, generation])
            born = self._children(parents, random) if generation else self._first(state, group, random)
            fitness = [self._fitness_in(state, group, genes) for genes in born]
            self._select(state, np.concatenate([parents, born]), [*state.fitness, *fitness], generation)
            best = np.array(state.best)
            best[list(group)] = state.population[0]
            state.best = best.tolist()
            if self.settings.state is not None:
                write_state(Path(self.settings.state), state)
        return self._candidates(np.array(state.best))

    def _remaining(self, state: SearchState) -> Iterator[int]:
        """Yields the generations that are left, 0 for a group's first individuals, with the state at their group."""
        while True:
            if state.generation < self.settings.generations:
                yield state.generation + 1
            elif state.group + 1 < len(self.groups):
                state.group, state.generation, state.population, state.fitness = state.group + 1, -1, [], []
            else:
                return

    def _select(self, state: SearchState, genes: Genes, fitness: list[float], generation: int) -> None:
        """Keeps the best of parents and children; among equals the older one."""
        kept = np.argsort(np.array(fitness), kind="stable")[: self.settings.population]
        state.population, state.fitness = genes[kept].tolist(), [fitness[index] for index in kept]
        state.generation = generation
        best, mean = state.fitness[0], float(np.mean(state.fitness))
        state.history.append({"group": state.group, "generation": generation, "best": best, "mean": mean})
        _log.info(
            "group %d of %d, generation %d of %d: best %s %.6f, mean %.6f", state.group + 1, len(self.groups),
            generation, self.settings.generations, self.settings.objective, best, mean,
        )  # fmt: skip

    def _first(self, state: SearchState, group: range, random: np.random.Generator) -> Genes:
        """Returns the best of now, rho 1 at uniform shares, and random changes of the best, [population, group, 3]."""
        best = np.array(state.best)[list(group)]
        ones = best.copy()
        ones[:, _WISH], ones[:, _RHO] = 1.0 - self.problem.method.sparsity, 1.0
        shape = (self.settings.population - 2, len(group))
        changed = np.broadcast_to(best, (*shape, 3)).copy()
        changed[..., _WISH] *= np.exp(_WISH_SPREAD * random.standard_normal(shape))
        changed[..., _RHO] += _RHO_SPREAD * random.standard_normal(shape)
        drawn, scores = random.random(shape), random.random(shape)
        changed[..., _SCORE] = np.where(drawn < _NEW_SCORE, scores, changed[..., _SCORE])
        return _clipped(np.concatenate([best[None], ones[None], changed]))

    def _children(self, parents: Genes, random: np.random.Generator) -> Genes:
        """Returns a child of each parent: half of its genes are x1 + 0.5 (x2 − x3) of three others."""
        children = parents.copy()
        for index in range(len(parents)):
            others = [other for other in range(len(parents)) if other != index]
            first, second, third = parents[random.choice(others, 3, replace=False)]
            mutant = first + _WEIGHT * (second - third)
            children[index] = np.where(random.random(mutant.shape) < _CROSSOVER, mutant, parents[index])
        return _clipped(children)

    def _fitness_in(self, state: SearchState, group: range, genes: Genes) -> float:
        """Returns the fitness of the best of now with other genes in one group."""
        every = np.array(state.best)
        every[list(group)] = genes
        value = self._fitness(every)
        self.measured += 1
        self.problem.report("allocate", self.measured, self.total)
        return value

    def _fitness(self, genes: Genes) -> float:
        """Returns the objective on the search's windows; less is better."""
        candidates = self._candidates(genes)
        self._decompose(candidates)
        self.trial.place(candidates)
        self._calibrate()
        total = 0.0
        with self.trial.running():
            for index, window in enumerate(self.tokens):
                if self.settings.objective == "kl":
                    loss = kl_divergence(self.problem.model, window[None], self.dense[index])
                else:
                    logits = self.problem.model(input_ids=window[None], use_cache=False).logits
                    loss = F.cross_entropy(logits[0, :-1].float(), window[1:], reduction="sum")
                total += float(loss)
        if not np.isfinite(total):
            raise SparsifyError(
                "the logits of the sparse model are not finite on the calibration text, so no allocation can be "
                "measured: check the model in this dtype, or load it in another (--dtype)"
            )
        mean = total / (self.tokens.numel() - (len(self.tokens) if self.settings.objective == "perplexity" else 0))
        return mean if self.settings.objective == "kl" else float(np.exp(mean))

    def _candidates(self, genes: Genes) -> dict[str, Candidate]:
        """Returns each linear's candidate; together they cost the budget to the byte."""
        wishes = {name: float(genes[index, _WISH]) for index, name in enumerate(self.names)}
        sparsity = self.problem.method.sparsity
        shares = fill_budget(wishes, self.problem.shapes, sparsity=sparsity, least=self.least)
        return {name: self._candidate(name, shares[name], genes[index]) for index, name in enumerate(self.names)}

    def _candidate(self, name: str, share: float, genes: Genes) -> Candidate:
        rho = float(genes[_RHO])
        if getattr(self.problem.method, "rho", None) == "auto":
            method: Any = replace(self.problem.method, sparsity=1.0 - share, **{"rho": rho})
            options: tuple[Candidate, ...] = method.candidates(name, self.problem.shapes[name])
        else:
            options = self.problem.offers(name, share)
        scores = sorted({option.score for option in options})
        score = scores[min(int(genes[_SCORE] * len(scores)), len(scores) - 1)]
        return min((o for o in options if o.score == score), key=lambda option: abs(option.rho - rho))

    def _start(self) -> Genes:
        """Returns uniform shares with the kinds of least output error: what allocation uniform would make."""
        uniform = 1.0 - self.problem.method.sparsity
        genes = np.full((len(self.names), 3), uniform)
        for index, name in enumerate(self.names):
            options = self.problem.offers(name, uniform)
            kind = self.kinds[name]
            scores = sorted({option.score for option in options})
            genes[index] = (uniform, kind.rho, (scores.index(kind.score) + 0.5) / len(scores))
        return genes

    def _observe(self) -> None:
        """Runs the dense model once: log-probabilities, histograms of scores, the best kinds at uniform shares."""
        uniform = 1.0 - self.problem.method.sparsity
        linears = self.problem.linears
        self.histograms: dict[tuple[str, str], ScoreHistogram] = {}
        self.kinds: dict[str, Candidate] = {}
        offers = {name: self.problem.offers(name, uniform) for name in self.names}

        def see(name: str, x: torch.Tensor) -> None:
            for option in {o.score: o for o in offers[name] if o.score != "residual-norm"}.values():
                scale = linears[name].scale(option)
                magnitudes = x.float().abs()
                self.histograms.setdefault((name, option.score), ScoreHistogram()).add(
                    magnitudes if scale is None else magnitudes * scale
                )
            if name not in self.kinds:
                self.kinds[name] = least_output_error(linears[name], offers[name], x.reshape(-1, x.shape[-1]))

        with hooked({name: linear.module for name, linear in linears.items()}, see):
            self.dense = [dense_log_probabilities(self.problem.model, window[None]) for window in self.tokens]

    def _decompose(self, candidates: dict[str, Candidate]) -> None:
        """Makes factors of twice the rank where one is larger than any before: each decomposition is of all ranks."""
        for name, candidate in candidates.items():
            linear = self.problem.linears[name]
            held = 0 if linear.spectrum is None else linear.spectrum.lr_a.shape[0]
            if candidate.rank > held:
                linear.factors(min(2 * candidate.rank, *linear.weight.shape))

    def _calibrate(self) -> None:
        """Sets the thresholds of all placed candidates, from the dense model's inputs on the search's windows."""
        if any(placed.candidate.score == "residual-norm" for placed in self.trial.placed.values()):
            # Its scales change with the rank: a histogram serves once.
            with self.trial.calibrating():
                self.problem.model.base_model(input_ids=self.tokens, use_cache=False)
            return
        for name, placed in self.trial.placed.items():
            candidate = placed.candidate
            # A dense linear, whose score is none that the method offers, keeps every channel.
            if candidate.density < 1.0:
                placed.threshold = self.histograms[name, candidate.score].threshold(candidate.density)

    def _resumed(self) -> SearchState | None:
        if self.settings.state is None:
            return None
        return read_state(Path(self.settings.state), self._fingerprint())

    def _fingerprint(self) -> dict[str, Any]:
        """Returns all that the result depends on."""
        settings = {name: value for name, value in asdict(self.settings).items() if name != "state"}
        return {
            "model": weights_sha256(self.problem.model),
            "calibration": self.problem.calibration.fingerprint["sha256"],
            "method": self.problem.method.name,
            **{f"method.{name}": value for name, value in options_of(self.problem.method).items()},
            **settings,
            "sparsify_version": __version__,
        }


def _clipped(genes: Genes) -> Genes:
    genes[..., _WISH] = genes[..., _WISH].clip(_LEAST_WISH, 1.0)
    genes[..., _RHO:] = genes[..., _RHO:].clip(0.0, 1.0)
    return genes


ALLOCATION = Evolutionary
