"""The kernels' own threads: over forks, beside other threads, on fewer CPUs, and asleep when there is nothing to do."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparsify.kernels import library, native
from sparsify.kernels.spec import SparseTensors

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
two_cpus = pytest.mark.skipif(CPUS < 2, reason="one CPU: the kernels start no thread of their own")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and CPU affinity are Linux's")

# A linear with a rank, so that threads wait for each other inside the call too; `right()` is one call, checked.
_SETUP = """
import os, signal, sys, threading, time
import torch
from sparsify.kernels import library, native
from sparsify.kernels.spec import SparseTensors

signal.alarm(60)
torch.manual_seed(0)
weight, bias, a, b = torch.randn(64, 256), torch.randn(256), torch.randn(4, 64), torch.randn(4, 256)
t = SparseTensors(weight.t(), bias, torch.tensor(0.5), None, a, b.t())
x = torch.randn(2, 64)
torch.set_num_threads(1)
expected = native.run(x, [t])[0]

def right():
    return torch.allclose(native.run(x, [t])[0], expected, rtol=1e-5, atol=1e-5)

def fork():
    child = os.fork()
    # Not inherited; what hangs must end, or the test waits for it.
    signal.alarm(30 if child == 0 else 60)
    return child

def tasks():
    return len(os.listdir("/proc/self/task"))

def ends_well(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run_alone(script: str) -> None:
    """Runs a script in a process that has no other threads, and ends itself when it hangs."""
    code = _SETUP + textwrap.dedent(script)
    # Threads of torch's would count, and do not survive a fork.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr or f"ended by signal {-done.returncode}"


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@linux
@two_cpus
def test_a_fork_has_threads_of_its_own() -> None:
    run_alone("""
        torch.set_num_threads(2)
        assert right()
        child = fork()
        if child == 0:
            grandchild = fork()
            ok = tasks() == 1 and right() and tasks() == 2 and right()
            if grandchild == 0:
                os._exit(not ok)
            os._exit(not (ok and ends_well(grandchild)))
        assert right()
        assert ends_well(child)
        assert right()
    """)


@linux
@two_cpus
def test_forks_while_another_thread_computes() -> None:
    """A fork waits for the call that runs: what a child has of it would be half done."""
    run_alone("""
        torch.set_num_threads(2)
        stop, wrong = threading.Event(), []

        def compute():
            while not stop.is_set():
                if not right():
                    wrong.append(1)

        worker = threading.Thread(target=compute)
        worker.start()
        children = []
        for _ in range(20):
            child = fork()
            if child == 0:
                os._exit(not all(right() for _ in range(3)))
            children.append(child)
            time.sleep(0.002)
        assert all([ends_well(child) for child in children])
        stop.set()
        worker.join()
        assert not wrong
    """)


@linux
@two_cpus
def test_one_thread_uses_no_worker() -> None:
    run_alone("""
        before = tasks()
        assert all(right() for _ in range(3))
        assert tasks() == before
        torch.set_num_threads(2)
        assert right()
        assert tasks() == before + 1
        torch.set_num_threads(50)
        assert right()
        assert tasks() == before + library.load().sp_cpus() - 1
    """)


@linux
def test_threads_sleep_when_there_is_nothing_to_do() -> None:
    run_alone("""
        torch.set_num_threads(2)
        assert all(right() for _ in range(10))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.02, time.process_time() - before
        assert right()
    """)


@linux
def test_one_cpu_of_the_process() -> None:
    run_alone("""
        cpus = os.sched_getaffinity(0)
        assert library.load().sp_cpus() == len(cpus)
        torch.set_num_threads(2)
        assert right()
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            assert library.load().sp_cpus() == 1
            assert right()
        os.sched_setaffinity(0, cpus)
        assert library.load().sp_cpus() == len(cpus)
        assert right()
    """)


@linux
@two_cpus
def test_calls_end_while_others_hold_every_cpu() -> None:
    """A thread that waits by spinning alone would hold the CPU of the one that it waits for."""
    run_alone("""
        children = []
        for _ in range(2 * len(os.sched_getaffinity(0))):
            child = fork()
            if child == 0:
                while True:
                    pass
            children.append(child)
        torch.set_num_threads(2)
        try:
            start = time.monotonic()
            assert all(right() for _ in range(50))
            # A share of a time slice for each of four waits a call; a spin to the slice's end is seconds.
            assert time.monotonic() - start < 25
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    """)


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_several_threads_take_turns(threads: int) -> None:
    """Each with its own sizes, so that work memory of one call shows in another where it is shared."""
    torch.set_num_threads(threads)
    calls: list[tuple[Tensor, list[SparseTensors], list[Tensor]]] = []
    for k in range(4):
        inputs = (9, 130, 64, 257)[k]
        site = [
            SparseTensors(
                torch.randn(inputs, outputs).t(), None, torch.tensor(0.4 * k), None,
                torch.randn(2, inputs), torch.randn(2, outputs).t(),
            )
            for outputs in (40, 7, 300)[: k % 3 + 1]
        ]  # fmt: skip
        x = torch.randn(1 + 2 * k, inputs)
        calls.append((x, site, native.run(x, site)))
    wrong: list[int] = []

    def compute(k: int) -> None:
        # torch's number of threads is the thread's own.
        torch.set_num_threads(threads)
        x, site, expected = calls[k]
        for _ in range(100):
            if not all(torch.equal(y, e) for y, e in zip(native.run(x, site), expected, strict=True)):
                wrong.append(k)

    workers = [threading.Thread(target=compute, args=(k % 4,)) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
