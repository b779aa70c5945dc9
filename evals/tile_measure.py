"""Seconds of a launch with a tile on a device, which `tile_search` asks for, and of masks against lists by density.

Weights are rotated and turns made by a timer (`gpu_timing`). The first result of a tile is checked: one that does not
compile, does not fit or computes something else is unfit. Inputs are random, half of the channels kept for masks, a
tenth for lists, by each token; lists are made before, except where both forms are compared. Not covered: attention,
norms.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from sparsify.evals.gpu_timing import (
    ACTIVATION,
    TOLERANCES,
    Call,
    Site,
    SiteCopies,
    Timer,
    Turn,
    copies_on,
    error_of,
    line_of,
)
from sparsify.evals.interleaving import in_turns
from sparsify.evals.stream import wait
from sparsify.evals.tile_search import Launch, UnfitError
from sparsify.kernels.gpu.tiles import Table, Tile, tile_for
from sparsify.kernels.spec import SparseTensors

# Where both forms are compared; above, lists cannot pay.
CROSSOVER_DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_CROSSOVER_ROUNDS = 5


@dataclass(frozen=True)
class _Subject:
    """The tensors of one launch: copies of its site, what is right for the first, and lists where it needs them."""

    launch: Launch
    copies: SiteCopies
    tensors: list[list[SparseTensors]]
    expected: list[Tensor]
    lists: list[Any] | None
    turns: dict[Tile, Turn] = field(default_factory=dict)


class SiteMeasure:
    """Seconds of a launch with a tile, on a device: weights rotated, the first result checked, turns made by a timer.

    Holds the weights of one launch at a time. cache: bytes of the device's L2. Raises UnfitError for a tile that cannot
    be used.
    """

    def __init__(self, device: torch.device, timer: Timer, *, cache: int) -> None:
        self._device, self._timer, self._cache = device, timer, cache
        self._subject: _Subject | None = None

    @torch.no_grad()
    def __call__(self, launch: Launch, tile: Tile) -> float:
        if self._subject is None or self._subject.launch != launch:
            # Before the next is made: two of them may not fit.
            self._subject = None
            self._subject = self._made(launch)
        turns = self._subject.turns
        if tile not in turns:
            turns[tile] = self._turn(self._subject, tile)
        return statistics.median(turns[tile]())

    @torch.no_grad()
    def compare(self, sites: Sequence[Site], table: Table, dtype: torch.dtype) -> list[tuple[float, float, float]]:
        """Returns (density, seconds masked, seconds indexed) of one token over all sites, lists made in the launch."""
        from sparsify.kernels.gpu.site import multiprocessors_of

        self._subject = None
        totals = {density: [0.0, 0.0] for density in CROSSOVER_DENSITIES}
        cases = list(product(CROSSOVER_DENSITIES, (False, True)))
        for site in sites:
            copies = self._copies(site, dtype, 1, min(CROSSOVER_DENSITIES))
            turns: dict[str, Turn] = {}
            for density, indexed in cases:
                tile = tile_for(
                    site.inputs, site.outputs, dtype, 1, indexed=indexed,
                    multiprocessors=multiprocessors_of(self._device), table=table,
                )  # fmt: skip
                call = _call(copies, copies.tensors(1.0 - density), tile, indexed=indexed, lists=None)
                turns[f"{density} {indexed}"] = self._timer(call, len(copies))
            rounds = in_turns(turns, _CROSSOVER_ROUNDS)
            for density, indexed in cases:
                totals[density][indexed] += statistics.median(chain.from_iterable(rounds[f"{density} {indexed}"]))
        return [(density, masked, indexed) for density, (masked, indexed) in totals.items()]

    def _made(self, launch: Launch) -> _Subject:
        from sparsify.kernels.gpu.scratch import scratch_of
        from sparsify.kernels.gpu.site import run_select

        copies = self._copies(launch.site, launch.dtype, launch.tokens, launch.density)
        tensors = copies.tensors(1.0 - launch.density)
        lists = None
        if launch.indexed:
            scratch = scratch_of(self._device)
            lists = [
                run_select(x, site, scratch=scratch, up=up, activation=ACTIVATION)
                for x, up, site in zip(copies.x, copies.up, tensors, strict=True)
            ]
        return _Subject(launch, copies, tensors, copies.expected(tensors[0]), lists)

    def _turn(self, subject: _Subject, tile: Tile) -> Turn:
        launch = subject.launch
        call = _call(subject.copies, subject.tensors, tile, indexed=launch.indexed, lists=subject.lists)
        try:
            error = error_of(call(0), subject.expected)
            turn = self._timer(call, len(subject.copies)) if error <= TOLERANCES[launch.dtype] else None
        except Exception as raised:
            # A compiler or a launch can fail in any way. Where the device itself is broken, this line raises.
            wait(self._device)
            raise UnfitError(line_of(raised)) from raised
        if turn is None:
            raise UnfitError(f"wrong by {error:.1e}", wrong=True)
        return turn

    def _copies(self, site: Site, dtype: torch.dtype, tokens: int, density: float) -> SiteCopies:
        number = copies_on(self._device, site.nbytes(dtype), density, cache=self._cache)
        return SiteCopies(site, dtype, tokens, self._device, number)


def _call(copies: SiteCopies, tensors: Any, tile: Tile, *, indexed: bool, lists: Sequence[Any] | None) -> Call:
    from sparsify.kernels.gpu.scratch import scratch_of
    from sparsify.kernels.gpu.site import run_site

    scratch = scratch_of(copies.device)
    return lambda index: run_site(
        copies.x[index], tensors[index], scratch=scratch, up=copies.up[index], activation=ACTIVATION,
        lists=None if lists is None else lists[index], indexed=indexed, tile=tile,
    )  # fmt: skip
