"""The search for the tile of a launch, with costs and a clock that are made up."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sparsify.errors import SparsifyError
from sparsify.evals.gpu_kernel_speed import MODELS
from sparsify.evals.gpu_timing import Site
from sparsify.evals.tile_search import (
    Found,
    Launch,
    Limits,
    UnfitError,
    crossing,
    fits,
    launches_of,
    rule_of,
    search,
    starts,
    variations,
)
from sparsify.kernels.gpu.tiles import Tile

Clock = Any
MakeCosts = Any
BF16 = torch.bfloat16
H100 = Limits(multiprocessors=132, shared_bytes=232448)
GATE_UP = Site("gate_up", 4096, (14336, 14336))
ONE = Launch(GATE_UP, BF16, 1, False)
BEST = Tile(512, 8, 3, 8, 6)


# ---- launches and candidates ----


def test_launches_are_named_once_and_one_token_comes_first() -> None:
    sites = [Site("q", 64, (64,)), Site("o", 64, (64,)), Site("down", 128, (64,), gated=True)]
    found = launches_of(sites, BF16, [4, 1, 4])
    assert [launch.key for launch in found] == [
        "64x64 bfloat16 1 masked", "64x64 bfloat16 1 indexed",
        "128x64 bfloat16 1 masked", "128x64 bfloat16 1 indexed",
        "64x64 bfloat16 4 masked", "64x64 bfloat16 4 indexed",
        "128x64 bfloat16 4 masked", "128x64 bfloat16 4 indexed",
    ]  # fmt: skip
    assert [launch.site.name for launch in found[:3]] == ["q", "q", "down"]


@pytest.mark.parametrize("tokens", [[], [3], [1, 16], [0]])
def test_numbers_of_tokens_without_an_entry(tokens: list[int]) -> None:
    with pytest.raises(SparsifyError, match="a table has entries for 1, 2, 4 and 8"):
        launches_of([GATE_UP], BF16, tokens)


ALL = [
    launch
    for dtype in (BF16, torch.float32)
    for block in MODELS.values()
    for launch in launches_of(block.sites(), dtype, (1, 8))
]


@pytest.mark.parametrize("launch", ALL, ids=lambda launch: launch.key)
def test_candidates_are_few_and_fit_the_device(launch: Launch) -> None:
    rule, *others = starts(launch, H100)
    assert rule == rule_of(launch, H100)
    assert len({rule, *others}) == 1 + len(others)
    assert 5 <= len(others) <= (36 if launch.tokens == 1 else 12)
    for tile in [
        *others,
        *variations(launch, H100, others[0], "splits"),
        *variations(launch, H100, others[0], "stages"),
    ]:
        assert fits(launch, H100, tile)
        assert tile.stages * tile.block_n * tile.block_k * launch.dtype.itemsize <= H100.shared_bytes
        # A thread loads 16 bytes at once, and sums of one token fit into its registers.
        values = tile.block_n * tile.block_k / (32 * tile.warps)
        assert values * launch.dtype.itemsize >= 16
        assert values <= (64 if launch.tokens == 1 else 128)
        assert launch.tokens == 1 or tile.block_k >= 16
        programs = sum(math.ceil(n / tile.block_n) for n in launch.site.outputs) * tile.splits
        assert programs <= 16 * 132


def test_less_shared_memory_means_fewer_stages() -> None:
    small = Limits(108, 65536)
    assert fits(ONE, H100, Tile(512, 32, 4, 8, 4))
    assert not fits(ONE, small, Tile(512, 32, 4, 8, 4))
    assert fits(ONE, small, Tile(512, 32, 4, 8, 2))


def test_a_list_is_cut_into_no_more_parts_than_it_has_blocks() -> None:
    o = Launch(Site("o", 2048, (2048,)), BF16, 1, True)
    # 205 channels are 13 blocks of 16.
    assert fits(o, H100, Tile(64, 16, 12, 4, 4))
    assert not fits(o, H100, Tile(64, 16, 16, 4, 4))
    # The union of 8 tokens is longer.
    assert fits(replace(o, tokens=8), H100, Tile(64, 16, 32, 4, 4))


def test_variations_start_near_the_tile() -> None:
    tile = Tile(256, 16, 4, 4, 4)
    assert [t.splits for t in variations(ONE, H100, tile, "splits")][:2] == [3, 6]
    assert [t.stages for t in variations(ONE, H100, tile, "stages")] == [5, 3, 6, 2, 8, 12]
    assert {replace(t, splits=4) for t in variations(ONE, H100, tile, "splits")} == {tile}


# ---- search ----


def test_the_search_finds_what_is_fastest(clock: Clock, make_costs: MakeCosts) -> None:
    measure = make_costs(BEST)
    found = search(ONE, measure, H100, seconds=1000, clock=clock)
    assert found.tile == BEST
    assert found.seconds == pytest.approx(1e-5)
    assert found.rule_seconds is not None
    assert found.rule_seconds > found.seconds
    assert (found.failed, found.wrong, found.complete, found.problem) == (0, 0, True, None)
    assert found.tried == len(measure.tiles(ONE.key))
    assert found.tried < 70
    assert found.to_dict()["gain"] == pytest.approx(found.rule_seconds / found.seconds)


def test_the_finalists_and_the_rules_tile_are_measured_in_turns(clock: Clock, make_costs: MakeCosts) -> None:
    measure = make_costs(BEST)
    search(ONE, measure, H100, seconds=1000, clock=clock)
    last = [tile for _, tile in measure.measured[-28:]]
    assert len(set(last)) == 4
    assert {BEST, rule_of(ONE, H100)} <= set(last)
    assert all(len(set(last[n : n + 4])) == 4 for n in range(0, 28, 4))
    assert last[0] != last[4]


def test_the_rules_tile_stays_unless_another_is_clearly_faster(clock: Clock) -> None:
    rule = rule_of(ONE, H100)

    def measure(launch: Launch, tile: Tile) -> float:
        return 1.005 if tile == rule else 1.0

    assert search(ONE, measure, H100, seconds=1000, clock=clock).tile == rule


def test_tiles_that_cannot_be_used_are_left_out_and_counted(clock: Clock, make_costs: MakeCosts) -> None:
    costs = make_costs(BEST)

    def measure(launch: Launch, tile: Tile) -> float:
        seconds = costs(launch, tile)
        if tile.stages == 6:
            raise UnfitError("out of resource: shared memory")
        if tile.block_n == 512:
            raise UnfitError("wrong by 1.0e-01", wrong=True)
        return seconds

    found = search(ONE, measure, H100, seconds=1000, clock=clock)
    assert found.tile is not None
    assert found.tile.block_n == 256
    assert found.tile.stages != 6
    tried = costs.tiles(ONE.key)
    assert found.failed == sum(tile.stages == 6 for tile in tried) > 0
    assert found.wrong == sum(tile.stages != 6 and tile.block_n == 512 for tile in tried) > 0
    assert found.tried == len(tried)


def test_a_rule_that_cannot_be_used_is_said(clock: Clock) -> None:
    rule = rule_of(ONE, H100)

    def measure(launch: Launch, tile: Tile) -> float:
        if tile == rule:
            raise UnfitError("no")
        return 1.0

    found = search(ONE, measure, H100, seconds=1000, clock=clock)
    assert found.tile not in (None, rule)
    assert (found.rule_seconds, found.problem, found.to_dict()["gain"]) == (None, "no", None)


def test_where_nothing_works_there_is_no_tile(clock: Clock) -> None:
    def measure(launch: Launch, tile: Tile) -> float:
        raise UnfitError("no compiler")

    found = search(ONE, measure, H100, seconds=1000, clock=clock)
    assert (found.tile, found.seconds, found.problem) == (None, None, "no compiler")
    assert found.failed == found.tried > 5


def test_what_else_a_measurement_raises_ends_the_search(clock: Clock) -> None:
    def measure(launch: Launch, tile: Tile) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        search(ONE, measure, H100, seconds=1000, clock=clock)


@pytest.mark.parametrize("seconds", [0.5, 5, 20, 60])
def test_the_search_ends_in_time(seconds: float, clock: Clock, make_costs: MakeCosts) -> None:
    found = search(ONE, make_costs(BEST, takes=0.5), H100, seconds=seconds, clock=clock)
    assert found.tile is not None
    assert found.rule_seconds is not None
    # The rule's tile and one round of the finalists are always measured.
    assert clock.now - 100 <= seconds + 0.5 * 5
    assert found.complete == (seconds == 60)


@pytest.mark.parametrize(
    ("points", "below"),
    [
        ([], 0.0),
        ([(0.1, 1.0, 2.0), (0.2, 1.0, 3.0)], 0.0),
        ([(0.1, 2.0, 1.0), (0.2, 2.0, 1.5)], 0.2),
        ([(0.1, 2.0, 1.0), (0.3, 2.0, 3.0), (0.5, 2.0, 1.0)], 0.2),
        ([(0.1, 2.0, 1.0), (0.2, 2.0, 2.0)], 0.2),
        ([(0.05, 4.0, 1.0), (0.1, 4.0, 6.0)], 0.08),
    ],
)
def test_crossing(points: list[tuple[float, float, float]], below: float) -> None:
    assert crossing(points) == below


def test_a_search_result_says_everything() -> None:
    found = Found(BEST, 2e-5, 3e-5, 40, 2, 1, False, "the rule failed")
    assert found.to_dict() == {
        "seconds": 2e-5, "rule_seconds": 3e-5, "gain": pytest.approx(1.5), "tried": 40,
        "failed": 2, "wrong": 1, "complete": False, "problem": "the rule failed",
    }  # fmt: skip
