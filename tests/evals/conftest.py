"""What makes measurements quick: a small stream for tiny models, costs of tiles that are made up, a bench on a CPU."""

import math
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.evals import cold_calls, stream
from sparsify.evals.gpu_bench import Bench
from sparsify.evals.gpu_timing import Call, DeviceCopy, Turn
from sparsify.evals.tile_search import Launch
from sparsify.kernels.gpu.tiles import RULES, Tile


@pytest.fixture
def small_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of 64 kB and two copies of each weight."""
    monkeypatch.setattr(stream, "_LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(stream, "cache_of", lambda device: None)
    monkeypatch.setattr(cold_calls, "last_level_cache", lambda: None)


class Clock:
    """Seconds that pass when something is measured."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Costs:
    """A measurement that takes a second: 10 µs for one tile, more for others the further away they are."""

    def __init__(self, clock: Clock, best: Tile, takes: float) -> None:
        self.clock, self.best, self.takes = clock, best, takes
        self.measured: list[tuple[str, Tile]] = []

    def __call__(self, launch: Launch, tile: Tile) -> float:
        self.clock.now += self.takes
        self.measured.append((launch.key, tile))
        away = sum(abs(math.log2(a / b)) for a, b in zip(astuple(tile), astuple(self.best), strict=True))
        return 1e-5 * (1 + 0.1 * away)

    def tiles(self, key: str) -> set[Tile]:
        return {tile for measured, tile in self.measured if measured == key}


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still until something is measured."""
    return Clock()


@pytest.fixture
def make_costs(clock: Clock) -> Callable[..., Costs]:
    """Makes a measurement of launches, on the test's clock, for which one tile is the best."""
    return lambda best, takes=1.0: Costs(clock, best, takes)


def rising() -> Callable[..., Turn]:
    """A timer that calls nothing: the first turn takes 1 ms, the second 2 ms, and so on."""
    made: list[object] = []

    def timer(call: Call, copies: int, *, calls: int = 64) -> Turn:
        made.append(call)
        seconds = 1e-3 * len(made)
        return lambda: [seconds, seconds]

    return timer


@pytest.fixture
def cpu_bench() -> Bench:
    """A bench on the CPU, for two rounds at 0 and 50%, with times that rise from turn to turn."""
    device = torch.device("cpu")
    return Bench(device, rising(), DeviceCopy(device, cache=0, least=1000), 0, RULES, 2, (0.0, 0.5))


@pytest.fixture
def write_teal(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkout with TEAL's layout and import, and a right product of our own, with lines before its result."""

    def write(*lines: str) -> Path:
        right = "return torch.where(x.float().abs() > threshold, x, 0).float() @ weight.t().float()"
        body = "\n    ".join([*lines, right])
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "sparse_gemv.py").write_text(
            "import sys\nimport torch\nsys.path.append('/nowhere')\nfrom compile_wrapper import BaseKernel\n"
            f"def splitk_sparse_gemv(x, weight, threshold, sparsity_bin):\n    {body}\n"
            "class SparseGEMV(BaseKernel):\n    pass\n"
        )
        return tmp_path

    return write


@pytest.fixture
def make_cell() -> Callable[..., dict[str, Any]]:
    """Makes a cell of `sparsify compare` up: a method at a sparsity with a likelihood, or what else it holds."""

    def make(method: str, sparsity: float, nll: float, *, seed: int | None = 0, **other: Any) -> dict[str, Any]:
        calibration = {"source": "text", "sequences": 2, "seq_len": 16, "sha256": f"{seed}"}
        key = {
            "model": "tiny", "model_sha256": "0" * 64, "device": "cpu", "method": method, "sparsity": sparsity,
            "protocol": "every-token", "text": "t.txt", "text_sha256": "1" * 64, "windows": 3, "seq_len": 16,
            "stride": 16, "bos": False, "seed": seed, "calibration": None if seed is None else calibration,
            "sparsify_version": "0",
        }  # fmt: skip
        quality = {
            "nll_per_token": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf, "bits_per_byte": 1.0,
            "tokens": 45, "bytes": 99, "scored": "all", "dtype": "float32",
        }  # fmt: skip
        result = {
            "quality": quality, "divergence": {"kl": nll - 1, "top1_agreement": 0.5, "tokens": 45},
            "weighted_sparsity": 0.5, "realised_sparsity": sparsity,
            "drift": {"mean": 0.01, "worst": {"linear": f"q{seed}", "drift": -0.1 - 0.01 * (seed or 0)}},
            "linears": [{"rho": 1.0, "rank": 0}],
        }  # fmt: skip
        return {"key": key} | (other or {"result": result})

    return make
