"""The measurement of tiles: real launches, with a timer that is made up, and on a GPU."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sparsify.evals import tile_measure, tile_search
from sparsify.evals.gpu_timing import Call, GraphTimer, Site, Turn
from sparsify.evals.machine import cache_of
from sparsify.evals.tile_measure import SiteMeasure
from sparsify.evals.tile_search import Launch, Limits, UnfitError, launches_of
from sparsify.evals.tuning import Tuning, about, tune
from sparsify.kernels.gpu import site as site_module
from sparsify.kernels.gpu.tiles import Table, Tile, read_table

Clock = Any
CPU = torch.device("cpu")
BF16 = torch.bfloat16
SMALL = [Site("o", 128, (64,)), Site("down", 96, (64,), gated=True)]
TINY = Limits(multiprocessors=1, shared_bytes=1 << 16)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "nvidia-h200.json"


def counting(turns: list[Call], clock: Clock) -> Callable[..., Turn]:
    """A timer that launches copy 0 once a turn and says that wider blocks are faster."""

    def timer(call: Call, copies: int, *, calls: int = 64) -> Turn:
        turns.append(call)
        number = len(turns)

        def turn() -> list[float]:
            clock.now += 1.0
            return [1.0 / number]

        return turn

    return timer


@pytest.mark.parametrize("tokens", [1, 2])
def test_real_launches_make_a_table(file: Path, tokens: int, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setitem(tile_search._FIRST, True, 3)
    monkeypatch.setitem(tile_search._FIRST, False, 3)
    turns: list[Call] = []
    measure = SiteMeasure(CPU, counting(turns, clock), cache=0)
    asked = launches_of(SMALL, BF16, [tokens])
    tuning = Tuning(file, about(CPU))
    tune(asked, tuning, measure, TINY, seconds=60, clock=clock)
    assert set(read_table(file).tiles) == {launch.key for launch in asked}
    assert all(found["wrong"] == found["failed"] == 0 for found in tuning.launches.values())
    # A turn is made once for each tile, however often it is measured.
    assert len(turns) == sum(found["tried"] for found in tuning.launches.values())
    assert json.loads(file.read_text())["versions"]["torch"] == torch.__version__


def test_a_tile_that_is_wrong_or_fails_is_unfit(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    right = site_module.run_site

    def broken(*args: Any, tile: Tile, **options: Any) -> Any:
        if tile.stages == 5:
            raise RuntimeError("out of resource:\nshared memory")
        return [y * (1.1 if tile.stages == 4 else 1.0) for y in right(*args, tile=tile, **options)]

    monkeypatch.setattr(site_module, "run_site", broken)
    measure = SiteMeasure(CPU, counting([], clock), cache=0)
    launch, tile = Launch(SMALL[0], BF16, 1, True), Tile(64, 32, 2, 4, 3)
    assert measure(launch, tile) == 1.0
    with pytest.raises(UnfitError, match=r"wrong by (9|1)\.\de-0[12]") as wrong:
        measure(launch, replace(tile, stages=4))
    assert wrong.value.wrong
    with pytest.raises(UnfitError, match="RuntimeError: out of resource: shared memory") as failed:
        measure(launch, replace(tile, stages=5))
    assert not failed.value.wrong
    assert measure(launch, tile) == 1.0


def test_both_forms_are_timed_with_the_tables_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, Tile, bool]] = []
    right = site_module.run_site

    def note(*args: Any, indexed: bool, tile: Tile, **options: Any) -> Any:
        seen.append((indexed, tile, options["lists"] is None))
        return right(*args, indexed=indexed, tile=tile, **options)

    monkeypatch.setattr(site_module, "run_site", note)
    monkeypatch.setattr(tile_measure, "CROSSOVER_DENSITIES", (0.1, 0.5))
    masked, indexed = Tile(64, 32, 1, 4, 2), Tile(64, 16, 2, 4, 2)
    names = [launch.key for launch in launches_of(SMALL[:1], BF16, [1])]
    table = Table("cpu", 0.2, dict(zip(names, (masked, indexed), strict=True)))
    order: list[Call] = []

    def timer(call: Call, copies: int, *, calls: int = 64) -> Turn:
        order.append(call)
        call(copies - 1)
        number = len(order)
        return lambda: [float(number)]

    points = SiteMeasure(CPU, timer, cache=0).compare(SMALL[:1], table, BF16)
    # Turns were made in this order: masked and indexed at the first density, then at the second.
    assert points == [(0.1, 1.0, 2.0), (0.5, 3.0, 4.0)]
    # Lists are made in the launch, as they are where no norm makes them.
    assert seen == [(False, masked, True), (True, indexed, True)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: graphs and events are CUDA's")
def test_on_a_gpu(file: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    measure = SiteMeasure(device, GraphTimer(device), cache=cache_of(device) or 0)
    asked = launches_of([Site("o", 1024, (1024,)), Site("down", 2048, (1024,), gated=True)], BF16, (1, 4))
    tuning = Tuning(file, about(device))
    tune(
        asked, tuning, measure, Limits.of(device), seconds=20,
        compare=lambda sites, table: measure.compare(sites, table, BF16),
    )  # fmt: skip
    assert all(found["wrong"] == 0 for found in tuning.launches.values())
    assert all(1e-7 < found["seconds"] < 1e-3 for found in tuning.launches.values())
    assert tuning.crossover is not None
    assert read_table(file).tiles
