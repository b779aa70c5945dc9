"""`--device-map`: models larger than one device, spread over memory and disk, measured as they are in one piece."""

import json
from pathlib import Path
from typing import Any

import pytest

Run = Any
# The embeddings of the tiny model fit, and of each checkpoint about one block of two.
ROOM = "cpu=330KB"
METHODS = {
    "rsparse": ["--method", "rsparse", "--rho", "0.8"],
    "topk": ["--method", "topk"],
    "cats": ["--method", "cats", "--sparsity", "0.3"],
}


@pytest.fixture(scope="module")
def checkpoints(
    app: Any, dense_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    from typer.testing import CliRunner

    folder = tmp_path_factory.mktemp("placed")
    text = ["--calibration", str(text_file), "--sequences", "2", "--seq-len", "32", "--eval-windows", "0"]
    for name, flags in METHODS.items():
        result = CliRunner().invoke(app, ["convert", str(dense_model), "--out", str(folder / name), *text, *flags])
        assert result.exit_code == 0, result.output
    return {name: folder / name for name in METHODS}


def _places(monkeypatch: pytest.MonkeyPatch) -> list[set[Any]]:
    """Returns a list of the places of each model that is loaded from now on."""
    from sparsify.cli.placement import Placement

    found: list[set[Any]] = []
    check = Placement.check

    def record(self: Placement, model: Any) -> None:
        found.append({str(place) for place in model.hf_device_map.values()} if self.device_map else set())
        check(self, model)

    monkeypatch.setattr(Placement, "check", record)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_perplexity_is_that_of_one_piece(
    run: Run, checkpoints: dict[str, Path], text_file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = _places(monkeypatch)
    flags = [checkpoints[name], "--text", text_file, "--seq-len", "32", "--limit", "3", "--format", "json"]
    whole = json.loads(run("eval", *flags).stdout)["models"]
    result = run("eval", *flags, "--device-map", "auto", "--max-memory", ROOM)
    assert result.exit_code == 0, result.output
    assert places == [set(), {"cpu", "disk"}]
    assert json.loads(result.stdout)["models"] == whole


def test_a_dense_model_is_spread_too(
    run: Run, dense_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = _places(monkeypatch)
    flags = [dense_model, "--text", text_file, "--seq-len", "32", "--limit", "3", "--format", "json"]
    whole = json.loads(run("eval", *flags).stdout)["models"]
    spread = json.loads(run("eval", *flags, "--device-map", "sequential", "--max-memory", ROOM).stdout)["models"]
    assert places == [set(), {"cpu", "disk"}]
    assert spread == whole


def test_generation_is_that_of_one_piece(run: Run, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    flags = [checkpoints["rsparse"], "--prompt", "def mean", "--max-new-tokens", "8", "--format", "json"]
    whole = json.loads(run("generate", *flags).stdout)
    folder = tmp_path / "offload"
    result = run("generate", *flags, "--device-map", "auto", "--max-memory", ROOM, "--offload-folder", folder)
    spread = json.loads(result.stdout)
    for side in ("dense", "sparse"):
        assert spread[side]["tokens"] == whole[side]["tokens"]


BAD = {
    "map": (["--device-map", "autos"], "unknown --device-map 'autos': allowed are auto"),
    "both": (["--device-map", "auto", "--device", "cpu"], "--device cpu and --device-map auto are two places"),
    "no map": (["--max-memory", "cpu=1GB"], "--max-memory is for --device-map"),
    "no map for a folder": (["--offload-folder", "x"], "--offload-folder is for --device-map"),
    "place": (["--device-map", "auto", "--max-memory", "gpu=1GB"], "'gpu=1GB' cannot be read"),
    "size": (["--device-map", "auto", "--max-memory", "cpu=much"], "'cpu=much' cannot be read"),
    "nothing": (["--device-map", "auto", "--max-memory", "cpu=1KB"], "leaves the embeddings no place in memory"),
}


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD)
def test_bad_input(run: Run, checkpoint: Path, text_file: Path, options: list[str], words: str) -> None:
    result = run("eval", checkpoint, "--text", text_file, *options)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert words in " ".join(result.stderr.split())
