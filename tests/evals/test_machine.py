"""What the machine is said to be, from made-up files of a system."""

import os
from pathlib import Path

import pytest
import torch

from sparsify.evals import machine
from sparsify.kernels import library


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /proc, /sys/devices/system/cpu and /sys/fs/cgroup, without a file in it."""
    for name in ("_PROC", "_CPUS", "_CGROUP"):
        monkeypatch.setattr(machine, name, tmp_path)
    return tmp_path


def _cache(folder: Path, cpu: int, level: int, kind: str, size: str, shared: str) -> None:
    index = folder / f"cpu{cpu}" / "cache" / f"index{level}{kind[0]}"
    index.mkdir(parents=True)
    for name, text in {"level": str(level), "type": kind, "size": size, "shared_cpu_list": shared}.items():
        (index / name).write_text(text + "\n")


def test_last_level_caches_of_the_allowed_cpus_add_up(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        _cache(system, cpu, 1, "Data", "32K", str(cpu))
        _cache(system, cpu, 4, "Instruction", "64M", str(cpu))
        _cache(system, cpu, 3, "Unified", "32768K" if cpu < 2 else "16M", shared)
    assert machine.last_level_cache() == (32 + 16) << 20


def test_a_system_that_tells_nothing(system: Path) -> None:
    assert machine.last_level_cache() is None
    assert machine.available_memory(torch.device("cpu")) is None
    assert machine.processor()


def test_memory_is_the_smaller_of_system_and_container(system: Path) -> None:
    (system / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    (system / "memory.max").write_text("max\n")
    (system / "memory.current").write_text("1\n")
    assert machine.available_memory(torch.device("cpu")) == 5000 << 10
    (system / "memory.max").write_text("4000000\n")
    (system / "memory.current").write_text("3000000\n")
    (system / "memory.stat").write_text("active_file 7\ninactive_file 500000\n")
    assert machine.available_memory(torch.device("cpu")) == 1500000


def test_waiting_of_all_threads_adds_up(system: Path) -> None:
    assert machine.waited_seconds() is None
    for thread, text in (("1", "5 2000000000 3\n"), ("2", "5 500000000 3\n"), ("3", "")):
        folder = system / "self" / "task" / thread
        folder.mkdir(parents=True)
        (folder / "schedstat").write_text(text)
    assert machine.waited_seconds() == 2.5


def test_environment() -> None:
    found = machine.environment(torch.device("cpu"))
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert (found["isa"] is None) == (library.load() is None)
