"""`sparsify tune`: what it refuses, and a whole run with a timer that is given in the place of a GPU's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sparsify.evals import tile_measure, tile_search, tuning
from sparsify.evals.gpu_timing import Call, Turn
from sparsify.kernels.gpu.tiles import Tile, read_table, ruled_tile

Run = Any


class HostTimer:
    """Calls copy 0 once a turn and makes a number up: every tile after the first is faster."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._made = torch.device("cpu"), 0

    def __call__(self, call: Call, copies: int, *, calls: int = 64) -> Turn:
        self._made += 1
        seconds = 1e-3 / self._made
        return lambda: [seconds]


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "GraphTimer", HostTimer)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    limits = tile_search.Limits(1, 1 << 16)
    monkeypatch.setattr(tile_search.Limits, "of", lambda device: limits)
    monkeypatch.setitem(tile_search._FIRST, True, 2)
    monkeypatch.setattr(tile_measure, "CROSSOVER_DENSITIES", (0.1, 0.5))
    about = tuning.about(torch.device("cpu")) | {"device": "Test GPU"}
    monkeypatch.setattr(tuning, "about", lambda device: about)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(run: Run, tmp_path: Path) -> None:
    result = run("tune", "--model", "llama-3-8b", "--out", tmp_path / "tiles")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == "error: Triton's kernels are timed on a GPU, and there is none here (device: cuda)\n"
    assert not (tmp_path / "tiles").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give --model NAME (llama-2-7b, llama-3-8b, llama-3.2-1b) or --shape KxN"),
        (["--model", "llama-3-9b"], "unknown model 'llama-3-9b'"),
        (["--shape", "4096"], "--shape 4096 is none: write KxN"),
        (["--shape", "64x64", "--dtype", "bfloat"], "unknown dtype 'bfloat': there are bfloat16"),
        (["--shape", "64x64", "--tokens", "3"], "a table has entries for 1, 2, 4 and 8"),
        (["--shape", "64x64", "--device", "cude"], "--device cude is none; write cuda"),
        (["--shape", "64x64", "--seconds", "0"], "Invalid value for '--seconds'"),
    ],
)
def test_bad_input(run: Run, tmp_path: Path, flags: list[str], words: str) -> None:
    result = run("tune", *flags, "--out", tmp_path)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_table_is_made_and_continued(run: Run, tmp_path: Path) -> None:
    flags = ["tune", "--shape", "64x64", "--tokens", "1", "--out", tmp_path / "tiles"]
    data = json.loads(run(*flags, "--format", "json").stdout)
    file = tmp_path / "tiles" / "test-gpu.json"
    keys = ["64x64 bfloat16 1 masked", "64x64 bfloat16 1 indexed"]
    assert (data["file"], data["device"], data["asked"], data["finished"]) == (str(file), "Test GPU", keys, keys)
    table = read_table(file)
    assert table.device == "Test GPU"
    for key in keys:
        launch = data["launches"][key]
        assert Tile(*launch["tile"]) == table.tiles[key] != ruled_tile(64, (64,), torch.bfloat16, 1, multiprocessors=1)
        assert launch["gain"] > 1
        assert launch["failed"] == launch["wrong"] == 0
    assert table.indexed_below == data["crossover"]["indexed_below"]
    before = file.read_bytes()
    shown = run(*flags)
    assert shown.exit_code == 0
    assert file.read_bytes() == before
    assert max(map(len, shown.stdout.splitlines()[:-1])) <= 80
    for words in ("Tiles, Test GPU", "masked", "below a density of", "Table: "):
        assert words in shown.stdout


@pytest.mark.usefixtures("no_gpu_needed")
def test_what_time_was_too_short_for_is_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = tuning.tune

    def hurried(*args: Any, seconds: float, **options: Any) -> None:
        clock = iter(float(n) for n in range(10**6))
        tune(*args, seconds=4.0, clock=lambda: next(clock), **options)

    monkeypatch.setattr(tuning, "tune", hurried)
    shown = run("tune", "--shape", "64x32", "--tokens", "1", "--out", tmp_path).stdout
    assert "2 of 2 launches are not finished: the same command again goes on." in shown
    assert "(unfinished)" in shown
