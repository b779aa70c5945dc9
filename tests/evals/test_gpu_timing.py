"""What a GPU measurement is made of, with a timer that is given; the real timer where there is a GPU."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals import gpu_timing
from sparsify.evals.gpu_timing import (
    TOLERANCES,
    Call,
    DeviceCopy,
    GraphTimer,
    Side,
    Site,
    SiteCopies,
    Turn,
    error_of,
    number_of_copies,
    require_gpu,
    timed,
)
from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.gpu.site import run_site
from sparsify.kernels.gpu.tiles import Tile

CPU = torch.device("cpu")
MB = 1 << 20
PAIR = Site("gate_up", 40, (24, 24))
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: graphs and events are CUDA's"),
]


def fixed(seconds: float) -> Callable[..., Turn]:
    """A timer that calls nothing: every turn takes so long."""
    return lambda call, copies, *, calls=64: lambda: [seconds]


# ---- copies ----


@pytest.mark.parametrize(
    ("size", "density", "cache", "free", "wanted"),
    [
        (100 * MB, 1.0, 50 * MB, None, 3),
        (100 * MB, 0.5, 50 * MB, None, 5),
        (100 * MB, 0.1, 50 * MB, None, 21),
        # Exactly four times is not more than four times.
        (50 * MB, 1.0, 50 * MB, None, 5),
        (1000 * MB, 1.0, 50 * MB, None, 2),
        (MB, 0.1, 50 * MB, None, 512),
        (100 * MB, 0.1, 50 * MB, 2000 * MB, 6),
        (48, 0.0, 0, None, 2),
    ],
)
def test_number_of_copies(size: int, density: float, cache: int, free: int | None, wanted: int) -> None:
    assert number_of_copies(size, density, cache=cache, free=free) == wanted


def test_memory_for_less_than_two_copies() -> None:
    with pytest.raises(UnavailableError, match="too few for two copies of weights of 104,857,600 bytes"):
        number_of_copies(100 * MB, 1.0, cache=MB, free=500 * MB)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_copies_of_a_site(dtype: torch.dtype) -> None:
    copies = SiteCopies(PAIR, dtype, 2, CPU, 3)
    assert len(copies) == 3
    assert PAIR.nbytes(dtype) == sum(w.nbytes for w in copies.weights[0])
    for weights, x, up, h, rows in zip(copies.weights, copies.x, copies.up, copies.h, copies.rows(), strict=True):
        assert [list(w.shape) for w in weights] == [[24, 40], [24, 40]]
        assert all(w.t().is_contiguous() and w.dtype == dtype for w in weights)
        assert list(x.shape) == [2, 40]
        assert (up, h) == (None, x)
        assert rows.is_contiguous()
        assert torch.equal(rows, torch.cat(weights))
    assert not torch.equal(copies.weights[0][0], copies.weights[1][0])
    assert not torch.equal(copies.x[0], copies.x[1])


def test_the_same_seed_gives_the_same_copies() -> None:
    one, same, other = (SiteCopies(PAIR, torch.float32, 1, CPU, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.weights[1][0], same.weights[1][0])
    assert torch.equal(one.x[1], same.x[1])
    assert not torch.equal(one.x[1], other.x[1])


def test_a_gated_site_multiplies_the_product_as_the_modules_round_it() -> None:
    copies = SiteCopies(Site("down", 300, (8,), gated=True), torch.bfloat16, 2, CPU, 2)
    for gate, up, h in zip(copies.x, copies.up, copies.h, strict=True):
        assert up is not None
        # The interpreter truncates where the modules round.
        torch.testing.assert_close(h, F.silu(gate) * up, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("scaled", [False, True])
def test_thresholds_leave_out_what_was_asked(sparsity: float, scaled: bool) -> None:
    copies = SiteCopies(Site("o", 1000, (4,)), torch.float32, 1, CPU, 2)
    tensors = copies.tensors(sparsity, scaled=scaled)
    assert copies.kept(tensors) == pytest.approx(1 - sparsity, abs=2e-3)
    assert tensors[0][0].density == 1 - sparsity


def test_several_tokens_keep_the_union() -> None:
    copies = SiteCopies(Site("o", 2000, (4,)), torch.float32, 4, CPU, 2)
    assert copies.kept(copies.tensors(0.5)) == pytest.approx(1 - 0.5**4, abs=0.03)


@pytest.mark.parametrize("indexed", [False, True], ids=["masked", "indexed"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_expected_is_what_the_kernels_compute(rank: int, gated: bool, indexed: bool) -> None:
    dtype = torch.bfloat16
    copies = SiteCopies(Site("any", 80, (33, 20), gated=gated), dtype, 1, CPU, 2)
    tensors = copies.tensors(0.5, rank=rank, scaled=rank > 0)
    found = run_site(
        copies.x[0], tensors[0], scratch=Scratch(CPU, size=64), up=copies.up[0], indexed=indexed,
        tile=Tile(block_n=64, block_k=32, splits=2, warps=4, stages=2),
    )  # fmt: skip
    expected = copies.expected(tensors[0])
    assert expected[0].dtype == torch.float64
    assert error_of(found, expected) <= TOLERANCES[dtype]
    assert error_of([1.01 * found[0], found[1]], expected) > TOLERANCES[dtype]


def test_recorded_inputs_are_used_in_turn() -> None:
    rows = torch.randn(3, 40)
    copies = SiteCopies(PAIR, torch.float32, 2, CPU, 2, recorded=rows)
    assert torch.equal(copies.x[0], rows[:2])
    assert torch.equal(copies.x[1], rows[[2, 0]])
    both = torch.randn(2, 2, 40)
    gated = SiteCopies(Site("down", 40, (8,), gated=True), torch.float32, 1, CPU, 2, recorded=both)
    assert torch.equal(gated.x[1], both[1:, 0])
    assert gated.up[1] is not None
    assert torch.equal(gated.up[1], both[1:, 1])


@pytest.mark.parametrize("shape", [(3, 39), (0, 40), (3, 2, 40), (40,)])
def test_recorded_inputs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(SparsifyError, match=r"recorded inputs of gate_up are \[.*they must be \[n, 40\]"):
        SiteCopies(PAIR, torch.float32, 1, CPU, 2, recorded=torch.zeros(shape))


# ---- checks and rounds ----


def test_error_is_relative_and_nan_stays() -> None:
    right = torch.ones(1, 4, dtype=torch.float64)
    assert error_of(right.float(), [right]) == 0
    assert error_of([right, 1.5 * right], [right, right]) == pytest.approx(0.5)
    assert math.isnan(error_of([right, math.nan * right], [right, right]))
    with pytest.raises(ValueError, match="longer"):
        error_of([right], [right, right])


def test_only_right_sides_are_timed() -> None:
    right = torch.ones(1, 4, dtype=torch.float64)

    def fails(index: int) -> object:
        raise RuntimeError("out of\nresource")

    sides = {
        "right": Side(lambda index: [right.float()], [right], 1e-3),
        "wrong": Side(lambda index: [1.1 * right], [right], 1e-3),
        "nan": Side(lambda index: math.nan * right, [right], 1e-3),
        "fails": Side(fails, [right], 1e-3),
        "torch": Side(lambda index: None),
    }
    found = timed(sides, 2, fixed(2e-3), DeviceCopy(CPU, cache=0, least=1000), 3)
    assert found.seconds == {"right": [[2e-3]] * 3, "torch": [[2e-3]] * 3}
    assert found.problems == {
        "wrong": "wrong by 1.0e-01, where 1e-03 is allowed",
        "nan": "wrong by nan, where 1e-03 is allowed",
        "fails": "RuntimeError: out of resource",
    }
    # 1000 bytes read and 1000 written in 2 ms.
    assert found.copy == pytest.approx([1e-3] * 3)


def test_a_side_that_cannot_be_captured_is_a_problem() -> None:
    def timer(call: Call, copies: int, *, calls: int = 64) -> Turn:
        if copies == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: [1.0]

    found = timed({"a": Side(lambda index: None)}, 2, timer, DeviceCopy(CPU, cache=0, least=8), 1)
    assert (found.seconds, list(found.problems)) == ({}, ["a"])


def test_sides_and_the_copy_take_turns() -> None:
    called: list[object] = []

    def timer(call: Call, copies: int, *, calls: int = 64) -> Turn:
        def turn() -> list[float]:
            called.append(call(0))
            return [1.0]

        return turn

    copy = DeviceCopy(CPU, cache=0, least=8)
    timed({"a": Side(lambda index: "a"), "b": Side(lambda index: "b")}, 2, timer, copy, 2)
    assert called == ["a", "b", None, "b", None, "a"]


def test_the_copy_is_larger_than_four_caches() -> None:
    copy = DeviceCopy(CPU, cache=100, least=8)
    assert copy.size == 2 * 401
    assert not torch.equal(copy._source, copy._target)
    copy(0)
    assert torch.equal(copy._source, copy._target)


# ---- the device ----


def test_nothing_is_timed_off_a_gpu() -> None:
    with pytest.raises(UnavailableError, match=r"timed on a GPU, and there is none here \(device: cpu\)"):
        GraphTimer(CPU)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sparsify.kernels.gpu.site.INTERPRETED", True)
    with pytest.raises(UnavailableError, match="TRITON_INTERPRET is set"):
        require_gpu(torch.device("cuda"))
    monkeypatch.setattr(gpu_timing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="Triton is not installed"):
        require_gpu(torch.device("cuda"))


class Cuda:
    """Stands in for torch.cuda: writes down what is asked of it; a replay takes 2 ms on its clock of events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.milliseconds, self.seconds = 0.0, 0.0
        cuda = torch.cuda
        for name in ("device", "current_stream", "Stream", "synchronize"):
            assert hasattr(cuda, name)
        # The parameter by which the capture runs on the stream of the warm-up.
        assert "stream" in inspect.signature(cuda.graph.__init__).parameters
        monkeypatch.setattr(cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(cuda, "current_stream", lambda: "main")
        monkeypatch.setattr(cuda, "Stream", lambda: self)
        monkeypatch.setattr(cuda, "stream", lambda stream: self.inside("side"))
        monkeypatch.setattr(cuda, "graph", lambda graph, stream: self.inside("capture"))
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(gpu_timing, "events", lambda number: [Mark(self) for _ in range(number)])
        monkeypatch.setattr(gpu_timing, "require_gpu", lambda device: None)
        monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: self.seconds)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self.log.append(f"{name} begins")
        yield
        self.log.append(f"{name} ends")

    def wait_stream(self, stream: str) -> None:
        self.log.append(f"side waits for {stream}")

    def synchronize(self) -> None:
        self.seconds += 0.02

    def replay(self) -> None:
        self.milliseconds += 2.0
        self.log.append("replay")


class Mark:
    """An event of the stand-in."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda

    def record(self) -> None:
        self.at = self._cuda.milliseconds
        self._cuda.log.append("mark")

    def elapsed_time(self, after: "Mark") -> float:
        return after.at - self.at


def test_a_turn_is_captured_after_a_warm_up_and_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    timer = GraphTimer(torch.device("cuda", 0), replays=2)
    turn = timer(lambda index: cuda.log.append(str(index)), 2, calls=3)
    assert cuda.log == [
        "side waits for main", "side begins", "0", "1", "side ends",
        "capture begins", "0", "1", "0", "1", "capture ends", "replay", "replay",
    ]  # fmt: skip
    cuda.log.clear()
    assert turn() == [5e-4, 5e-4]
    assert cuda.log == ["replay", "mark", "replay", "mark", "replay", "mark"]


class TestOnDevice:
    """The one part that needs a GPU."""

    pytestmark = needs_gpu

    def test_a_copy_moves_what_memory_can_move(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        copy = DeviceCopy(device, cache=50 * MB)
        seconds = GraphTimer(device)(copy, 1, calls=4)()
        assert len(seconds) == 3
        assert all(50 < copy.size / s / 1e9 < 20000 for s in seconds)

    def test_a_turn_uses_every_copy_and_counts_its_calls(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        counts = torch.zeros(3, device=device)
        turn = GraphTimer(device, replays=2)(lambda index: counts[index].add_(1), 3, calls=6)
        before = counts.tolist()
        assert len(turn()) == 2
        # Two replays that are measured and one before them, of two passes each.
        assert counts.tolist() == [number + 6 for number in before]

    def test_twice_the_work_takes_longer(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        timer = GraphTimer(device)
        small, large = (timer(DeviceCopy(device, cache=0, least=n * MB), 1) for n in (64, 256))
        assert min(large()) > 2 * min(small())

    def test_a_site_is_timed_as_it_is_launched(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        site = Site("o", 1024, (1024,))
        copies = SiteCopies(site, torch.bfloat16, 1, device, 4)
        tensors, scratch = copies.tensors(0.5), Scratch(device)
        sides = {
            form: Side(
                lambda index, indexed=form == "indexed": run_site(  # type: ignore[misc]
                    copies.x[index], tensors[index], scratch=scratch, indexed=indexed
                ),
                copies.expected(tensors[0]),
                TOLERANCES[torch.bfloat16],
            )
            for form in ("masked", "indexed")
        }
        found = timed(sides, 4, GraphTimer(device), DeviceCopy(device, cache=MB), 2)
        assert found.problems == {}
        assert all(1e-7 < s < 1e-3 for rounds in found.seconds.values() for values in rounds for s in values)
