"""The search for tiles, with costs and a clock that are made up, and with real launches."""

import json
import math
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sparsify.errors import SparsifyError
from sparsify.evals import tuning as module
from sparsify.evals.gpu_kernel_speed import MODELS
from sparsify.evals.gpu_timing import Call, GraphTimer, Site, Turn
from sparsify.evals.machine import cache_of
from sparsify.evals.tuning import (
    Found,
    Launch,
    Limits,
    SiteMeasure,
    Tuning,
    UnfitError,
    about,
    crossing,
    fits,
    launches_of,
    main,
    rule_of,
    search,
    sites_of,
    starts,
    tune,
    variations,
)
from sparsify.kernels.gpu import site as site_module
from sparsify.kernels.gpu.tiles import RULES, Table, Tile, read_table, tile_for

CPU = torch.device("cpu")
BF16 = torch.bfloat16
H100 = Limits(multiprocessors=132, shared_bytes=232448)
GATE_UP = Site("gate_up", 4096, (14336, 14336))
ONE = Launch(GATE_UP, BF16, 1, False)
ABOUT = {"device": "NVIDIA H200", "versions": {"triton": "3.6"}, "date": "2026-11-23", "protocol": {"rounds": 7}}
BEST = Tile(512, 8, 3, 8, 6)


class Clock:
    """Seconds that pass when something is measured."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Costs:
    """A measurement that takes a second: 10 µs for one tile, more for others the further away they are."""

    def __init__(self, clock: Clock, best: Tile = BEST, takes: float = 1.0) -> None:
        self.clock, self.best, self.takes = clock, best, takes
        self.measured: list[tuple[str, Tile]] = []

    def __call__(self, launch: Launch, tile: Tile) -> float:
        self.clock.now += self.takes
        self.measured.append((launch.key, tile))
        away = sum(abs(math.log2(a / b)) for a, b in zip(astuple(tile), astuple(self.best), strict=True))
        return 1e-5 * (1 + 0.1 * away)

    def tiles(self, key: str) -> set[Tile]:
        return {tile for measured, tile in self.measured if measured == key}


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


@pytest.mark.parametrize(
    ("text", "inputs", "outputs"),
    [("64x32", 64, (32,)), ("4096x14336+14336", 4096, (14336, 14336)), ("8x4+2+1", 8, (4, 2, 1))],
)
def test_shapes(text: str, inputs: int, outputs: tuple[int, ...]) -> None:
    *first, last = sites_of(["llama-3-8b"], [text])
    assert first == MODELS["llama-3-8b"].sites()
    assert (last.inputs, last.outputs, last.gated) == (inputs, outputs, False)


@pytest.mark.parametrize("text", ["", "64", "64x", "x64", "0x64", "64x0", "64x1+2+3+4", "64x32+", "-1x4", "64 x 32"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(SparsifyError, match="write KxN"):
        sites_of([], [text])


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


def test_the_search_finds_what_is_fastest() -> None:
    clock = Clock()
    measure = Costs(clock)
    found = search(ONE, measure, H100, seconds=1000, clock=clock)
    assert found.tile == BEST
    assert found.seconds == pytest.approx(1e-5)
    assert found.rule_seconds is not None
    assert found.rule_seconds > found.seconds
    assert (found.failed, found.wrong, found.complete, found.problem) == (0, 0, True, None)
    assert found.tried == len(measure.tiles(ONE.key))
    assert found.tried < 70
    assert found.to_dict()["gain"] == pytest.approx(found.rule_seconds / found.seconds)


def test_the_finalists_and_the_rules_tile_are_measured_in_turns() -> None:
    clock = Clock()
    measure = Costs(clock)
    search(ONE, measure, H100, seconds=1000, clock=clock)
    last = [tile for _, tile in measure.measured[-28:]]
    assert len(set(last)) == 4
    assert {BEST, rule_of(ONE, H100)} <= set(last)
    assert all(len(set(last[n : n + 4])) == 4 for n in range(0, 28, 4))
    assert last[0] != last[4]


def test_the_rules_tile_stays_unless_another_is_clearly_faster() -> None:
    rule = rule_of(ONE, H100)

    def measure(launch: Launch, tile: Tile) -> float:
        return 1.005 if tile == rule else 1.0

    assert search(ONE, measure, H100, seconds=1000, clock=Clock()).tile == rule


def test_tiles_that_cannot_be_used_are_left_out_and_counted() -> None:
    clock = Clock()
    costs = Costs(clock)

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


def test_a_rule_that_cannot_be_used_is_said() -> None:
    rule = rule_of(ONE, H100)

    def measure(launch: Launch, tile: Tile) -> float:
        if tile == rule:
            raise UnfitError("no")
        return 1.0

    found = search(ONE, measure, H100, seconds=1000, clock=Clock())
    assert found.tile not in (None, rule)
    assert (found.rule_seconds, found.problem, found.to_dict()["gain"]) == (None, "no", None)


def test_where_nothing_works_there_is_no_tile() -> None:
    def measure(launch: Launch, tile: Tile) -> float:
        raise UnfitError("no compiler")

    found = search(ONE, measure, H100, seconds=1000, clock=Clock())
    assert (found.tile, found.seconds, found.problem) == (None, None, "no compiler")
    assert found.failed == found.tried > 5


def test_what_else_a_measurement_raises_ends_the_search() -> None:
    def measure(launch: Launch, tile: Tile) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        search(ONE, measure, H100, seconds=1000, clock=Clock())


@pytest.mark.parametrize("seconds", [0.5, 5, 20, 60])
def test_the_search_ends_in_time(seconds: float) -> None:
    clock = Clock()
    found = search(ONE, Costs(clock, takes=0.5), H100, seconds=seconds, clock=clock)
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


# ---- a table ----


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "nvidia-h200.json"


def launches(*tokens: int) -> list[Launch]:
    return launches_of(MODELS["llama-3-8b"].sites(), BF16, tokens)


def test_every_launch_is_searched_and_written(file: Path) -> None:
    clock, asked = Clock(), launches(1, 2)
    costs = Costs(clock)
    written: list[int] = []

    def progress(done: int, total: int) -> None:
        assert total == 16
        written.append(len(read_table(file).tiles))

    tune(asked, Tuning(file, ABOUT), costs, H100, seconds=1e6, clock=clock, progress=progress)
    assert written == list(range(1, 17))
    table = read_table(file)
    assert (table.device, table.indexed_below) == ("NVIDIA H200", RULES.indexed_below)
    assert set(table.tiles) == {launch.key for launch in asked}
    assert table.tiles[ONE.key] == BEST
    found = tile_for(4096, (14336, 14336), BF16, 1, indexed=False, multiprocessors=132, table=table)
    assert found == BEST
    data = json.loads(file.read_text())
    assert {name: data[name] for name in ABOUT} == ABOUT
    assert data["launches"][ONE.key]["complete"]
    assert list(file.parent.iterdir()) == [file]


def test_time_is_shared_and_one_token_gets_the_most(file: Path) -> None:
    clock = Clock()
    costs = Costs(clock)
    tuning = Tuning(file, ABOUT)
    tune(launches(1, 2, 4, 8), tuning, costs, H100, seconds=400, clock=clock)
    # One measurement of each launch, and a round of its finalists, are not cut short.
    assert clock.now - 100 <= 400 + 5 * 32
    assert len(tuning.launches) >= 24
    tried = {key: found["tried"] for key, found in tuning.launches.items()}
    single = [n for key, n in tried.items() if " 1 " in key]
    assert min(single) > max(n for key, n in tried.items() if " 1 " not in key)
    assert max(single) - min(single) <= 8
    assert not any(found["complete"] for found in tuning.launches.values())


def test_time_that_is_not_used_goes_to_the_next(file: Path) -> None:
    clock = Clock()
    tuning = Tuning(file, ABOUT)

    def measure(launch: Launch, tile: Tile) -> float:
        if launch.key != asked[-1].key:
            clock.now += 0.001
            raise UnfitError("no")
        clock.now += 1.0
        return 1.0

    asked = launches(1)
    tune(asked, tuning, measure, H100, seconds=200, clock=clock)
    assert tuning.launches[asked[-1].key]["complete"]


def test_a_table_goes_on_where_it_ended(file: Path) -> None:
    clock, asked = Clock(), launches(1)
    costs = Costs(clock)

    def interrupted(launch: Launch, tile: Tile) -> float:
        if launch == asked[3]:
            raise KeyboardInterrupt
        return costs(launch, tile)

    with pytest.raises(KeyboardInterrupt):
        tune(asked, Tuning(file, ABOUT), interrupted, H100, seconds=1e6, clock=clock)
    before = read_table(file).tiles
    assert len(before) == 3
    again = Costs(clock)
    tune(asked, Tuning(file, ABOUT), again, H100, seconds=1e6, clock=clock)
    assert {key for key, _ in again.measured} == {launch.key for launch in asked[3:]}
    after = read_table(file).tiles
    assert {key: after[key] for key in before} == before
    assert len(after) == 8


def test_an_unfinished_launch_is_searched_again(file: Path) -> None:
    clock = Clock()
    tune([ONE], Tuning(file, ABOUT), Costs(clock), H100, seconds=5, clock=clock)
    assert not json.loads(file.read_text())["launches"][ONE.key]["complete"]
    tune([ONE], Tuning(file, ABOUT), Costs(clock), H100, seconds=1e6, clock=clock)
    assert json.loads(file.read_text())["launches"][ONE.key]["complete"]


@pytest.mark.parametrize("name", ["device", "versions", "protocol"])
def test_a_table_of_something_else_is_not_continued(file: Path, name: str) -> None:
    clock = Clock()
    tune([ONE], Tuning(file, ABOUT), Costs(clock), H100, seconds=1e6, clock=clock)
    with pytest.raises(SparsifyError, match=f"was made with another {name} .*delete it, or choose another folder"):
        Tuning(file, {**ABOUT, name: "other"})
    # Another day is the same measurement.
    assert Tuning(file, {**ABOUT, "date": "2026-11-24"}).tiles


def test_a_damaged_table_is_not_continued(file: Path) -> None:
    file.write_text("{")
    with pytest.raises(SparsifyError, match="is no table of tiles"):
        Tuning(file, ABOUT)


def test_forms_are_compared_once_after_one_token(file: Path) -> None:
    clock = Clock()
    costs, compared = Costs(clock), []

    def compare(sites: Any, table: Table) -> list[tuple[float, float, float]]:
        compared.append(([site.name for site in sites], {key.split()[-2] for key in table.tiles}, len(table.tiles)))
        return [(0.1, 2.0, 1.0), (0.3, 2.0, 3.0)]

    tune(launches(1, 4), Tuning(file, ABOUT), costs, H100, seconds=1e6, compare=compare, clock=clock)
    assert compared == [(["qkv", "o", "gate_up", "down"], {"1"}, 8)]
    assert read_table(file).indexed_below == 0.2
    points = json.loads(file.read_text())["crossover"]["points"]
    assert points[0] == {"density": 0.1, "masked_ms": 2000.0, "indexed_ms": 1000.0}
    tune(launches(1, 4), Tuning(file, ABOUT), costs, H100, seconds=1e6, compare=compare, clock=clock)
    tune(launches(8), Tuning(file, ABOUT), costs, H100, seconds=1e6, compare=compare, clock=clock)
    assert len(compared) == 1


def test_sites_without_a_tile_are_not_compared(file: Path) -> None:
    clock = Clock()
    costs, compared = Costs(clock), []

    def measure(launch: Launch, tile: Tile) -> float:
        if launch.site.name != "o" and launch.indexed:
            raise UnfitError("no")
        return costs(launch, tile)

    def compare(sites: Any, table: Table) -> list[tuple[float, float, float]]:
        compared.append([site.name for site in sites])
        return []

    tune(launches(1), Tuning(file, ABOUT), measure, H100, seconds=1e6, compare=compare, clock=clock)
    assert compared == [["o"]]


# ---- real launches ----


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


SMALL = [Site("o", 128, (64,)), Site("down", 96, (64,), gated=True)]
TINY = Limits(multiprocessors=1, shared_bytes=1 << 16)


@pytest.mark.parametrize("tokens", [1, 2])
def test_real_launches_make_a_table(file: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._FIRST, True, 3)
    monkeypatch.setitem(module._FIRST, False, 3)
    clock, turns = Clock(), []
    measure = SiteMeasure(CPU, counting(turns, clock), cache=0)
    asked = launches_of(SMALL, BF16, [tokens])
    tuning = Tuning(file, about(CPU))
    tune(asked, tuning, measure, TINY, seconds=60, clock=clock)
    assert set(read_table(file).tiles) == {launch.key for launch in asked}
    assert all(found["wrong"] == found["failed"] == 0 for found in tuning.launches.values())
    # A turn is made once for each tile, however often it is measured.
    assert len(turns) == sum(found["tried"] for found in tuning.launches.values())
    assert json.loads(file.read_text())["versions"]["torch"] == torch.__version__


def test_a_tile_that_is_wrong_or_fails_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    right = site_module.run_site

    def broken(*args: Any, tile: Tile, **options: Any) -> Any:
        if tile.stages == 5:
            raise RuntimeError("out of resource:\nshared memory")
        return [y * (1.1 if tile.stages == 4 else 1.0) for y in right(*args, tile=tile, **options)]

    monkeypatch.setattr(site_module, "run_site", broken)
    measure = SiteMeasure(CPU, counting([], Clock()), cache=0)
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
    monkeypatch.setattr(module, "CROSSOVER_DENSITIES", (0.1, 0.5))
    masked, indexed = Tile(64, 32, 1, 4, 2), Tile(64, 16, 2, 4, 2)
    names = [launch.key for launch in launches_of(SMALL[:1], BF16, [1])]
    table = Table("cpu", 0.2, dict(zip(names, (masked, indexed), strict=True)))
    clock = Clock()
    order: list[Call] = []

    def timer(call: Call, copies: int, *, calls: int = 64) -> Turn:
        order.append(call)
        call(copies - 1)
        number = len(order)
        clock.now += 1
        return lambda: [float(number)]

    points = SiteMeasure(CPU, timer, cache=0).compare(SMALL[:1], table, BF16)
    # Turns were made in this order: masked and indexed at the first density, then at the second.
    assert points == [(0.1, 1.0, 2.0), (0.5, 3.0, 4.0)]
    # Lists are made in the launch, as they are where no norm makes them.
    assert seen == [(False, masked, True), (True, indexed, True)] * 2


def test_a_search_result_says_everything() -> None:
    found = Found(BEST, 2e-5, 3e-5, 40, 2, 1, False, "the rule failed")
    assert found.to_dict() == {
        "seconds": 2e-5, "rule_seconds": 3e-5, "gain": pytest.approx(1.5), "tried": 40,
        "failed": 2, "wrong": 1, "complete": False, "problem": "the rule failed",
    }  # fmt: skip


def test_the_module_runs_as_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tuned(launches: Any, out: Path, *, seconds: float, device: str, progress: Any) -> Tuning:
        assert ([launch.key for launch in launches], seconds, device) == (
            ["64x32 float16 1 masked", "64x32 float16 1 indexed"], 5.0, "cuda"
        )  # fmt: skip
        tuning = Tuning(out / "x.json", ABOUT)
        tuning.take(launches[0], Found(BEST, 2e-5, 3e-5, 40, 2, 1, True))
        tuning.take(launches[1], Found(None, None, None, 1, 1, 0, False, "no"))
        return tuning

    monkeypatch.setattr(module, "tune_device", tuned)
    flags = ["--shape", "64x32", "--dtype", "float16", "--tokens", "1", "--seconds", "5", "--out", str(tmp_path)]
    assert main(flags) == 0
    assert capsys.readouterr().out.splitlines() == [
        "64x32 float16 1 masked: 512 8 3 8 6, 20.0 µs, 1.50× the rule's",
        "64x32 float16 1 indexed: none works (unfinished)",
        str(tmp_path / "x.json"),
    ]
    assert main(["--model", "llama-3-9b", "--out", str(tmp_path)]) == 2
    assert "Did you mean 'llama-3-8b'?" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_program_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "llama-3-8b", "--out", str(tmp_path / "tiles")]) == 4
    assert "there is none here" in capsys.readouterr().err
    assert not (tmp_path / "tiles").exists()


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
