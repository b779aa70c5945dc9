"""A table of tiles in the making, with costs and a clock that are made up, and the program."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sparsify.errors import SparsifyError
from sparsify.evals import tuning as module
from sparsify.evals.gpu_kernel_speed import MODELS
from sparsify.evals.gpu_timing import Site
from sparsify.evals.tile_search import Found, Launch, Limits, UnfitError, launches_of
from sparsify.evals.tuning import Tuning, main, sites_of, tune
from sparsify.kernels.gpu.tiles import RULES, Table, Tile, read_table, tile_for

Clock = Any
MakeCosts = Any
BF16 = torch.bfloat16
H100 = Limits(multiprocessors=132, shared_bytes=232448)
ONE = Launch(Site("gate_up", 4096, (14336, 14336)), BF16, 1, False)
ABOUT = {"device": "NVIDIA H200", "versions": {"triton": "3.6"}, "date": "2026-11-23", "protocol": {"rounds": 7}}
BEST = Tile(512, 8, 3, 8, 6)


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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "nvidia-h200.json"


def launches(*tokens: int) -> list[Launch]:
    return launches_of(MODELS["llama-3-8b"].sites(), BF16, tokens)


def test_every_launch_is_searched_and_written(file: Path, clock: Clock, make_costs: MakeCosts) -> None:
    asked = launches(1, 2)
    costs = make_costs(BEST)
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


def test_time_is_shared_and_one_token_gets_the_most(file: Path, clock: Clock, make_costs: MakeCosts) -> None:
    costs = make_costs(BEST)
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


def test_time_that_is_not_used_goes_to_the_next(file: Path, clock: Clock) -> None:
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


def test_a_table_goes_on_where_it_ended(file: Path, clock: Clock, make_costs: MakeCosts) -> None:
    asked = launches(1)
    costs = make_costs(BEST)

    def interrupted(launch: Launch, tile: Tile) -> float:
        if launch == asked[3]:
            raise KeyboardInterrupt
        return costs(launch, tile)

    with pytest.raises(KeyboardInterrupt):
        tune(asked, Tuning(file, ABOUT), interrupted, H100, seconds=1e6, clock=clock)
    before = read_table(file).tiles
    assert len(before) == 3
    again = make_costs(BEST)
    tune(asked, Tuning(file, ABOUT), again, H100, seconds=1e6, clock=clock)
    assert {key for key, _ in again.measured} == {launch.key for launch in asked[3:]}
    after = read_table(file).tiles
    assert {key: after[key] for key in before} == before
    assert len(after) == 8


def test_an_unfinished_launch_is_searched_again(file: Path, clock: Clock, make_costs: MakeCosts) -> None:
    tune([ONE], Tuning(file, ABOUT), make_costs(BEST), H100, seconds=5, clock=clock)
    assert not json.loads(file.read_text())["launches"][ONE.key]["complete"]
    tune([ONE], Tuning(file, ABOUT), make_costs(BEST), H100, seconds=1e6, clock=clock)
    assert json.loads(file.read_text())["launches"][ONE.key]["complete"]


@pytest.mark.parametrize("name", ["device", "versions", "protocol"])
def test_a_table_of_something_else_is_not_continued(file: Path, name: str, clock: Clock, make_costs: MakeCosts) -> None:
    tune([ONE], Tuning(file, ABOUT), make_costs(BEST), H100, seconds=1e6, clock=clock)
    with pytest.raises(SparsifyError, match=f"was made with another {name} .*delete it, or choose another folder"):
        Tuning(file, {**ABOUT, name: "other"})
    # Another day is the same measurement.
    assert Tuning(file, {**ABOUT, "date": "2026-11-24"}).tiles


def test_a_damaged_table_is_not_continued(file: Path) -> None:
    file.write_text("{")
    with pytest.raises(SparsifyError, match="is no table of tiles"):
        Tuning(file, ABOUT)


def test_forms_are_compared_once_after_one_token(file: Path, clock: Clock, make_costs: MakeCosts) -> None:
    costs, compared = make_costs(BEST), []

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


def test_sites_without_a_tile_are_not_compared(file: Path, clock: Clock, make_costs: MakeCosts) -> None:
    costs, compared = make_costs(BEST), []

    def measure(launch: Launch, tile: Tile) -> float:
        if launch.site.name != "o" and launch.indexed:
            raise UnfitError("no")
        return costs(launch, tile)

    def compare(sites: Any, table: Table) -> list[tuple[float, float, float]]:
        compared.append([site.name for site in sites])
        return []

    tune(launches(1), Tuning(file, ABOUT), measure, H100, seconds=1e6, compare=compare, clock=clock)
    assert compared == [["o"]]


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
