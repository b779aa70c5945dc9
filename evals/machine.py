"""What a measurement has to say about the machine: processor, caches, free memory, threads, versions.

Read from Linux's /proc and /sys; what another system does not tell is None. Not covered: AMD's clocks.
"""

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
import transformers

import sparsify
from sparsify.kernels import library

_PROC, _CPUS, _CGROUP = Path("/proc"), Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def environment(device: torch.device) -> dict[str, Any]:
    """Returns processor, device, threads, the native kernels' instruction set, caches, versions and the date."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "last_level_cache_bytes": cache_of(device),
        "versions": {
            "sparsify": sparsify.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            **({"triton": _version("triton"), "cuda": torch.version.cuda} if device.type == "cuda" else {}),
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **({"gpu": gpu(device)} if device.type == "cuda" else {}),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """Returns what a GPU is and how it is set, as torch and NVIDIA's tool tell; nothing is changed."""
    properties = torch.cuda.get_device_properties(device)
    told = {
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }
    asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
    index = str(device.index or torch.cuda.current_device())
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "-i", index]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return told
    return told | dict(zip(asked, (part.strip() for part in answer.split(",")), strict=False))


def processor() -> str:
    """Returns the processor's name as the system gives it."""
    for line in _read(_PROC / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str | None:
    """Returns the instruction set that the native kernels use, None where they are not there."""
    native = library.load()
    return None if native is None else str(native.sp_isa_in_use().decode())


def last_level_cache() -> int | None:
    """Returns the bytes of all last-level caches of the CPUs that this process may use."""
    found: dict[tuple[int, str], int] = {}
    for cpu in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ():
        for folder in (_CPUS / f"cpu{cpu}" / "cache").glob("index*"):
            kind, size, shared = (_read(folder / name).strip() for name in ("type", "size", "shared_cpu_list"))
            if kind in ("Data", "Unified") and size[-1:] in _UNITS:
                found[int(_read(folder / "level")), shared] = int(size[:-1]) * _UNITS[size[-1]]
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def cache_of(device: torch.device) -> int | None:
    """Returns the bytes of the last-level cache that a device's memory is read through."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return last_level_cache()


def available_memory(device: torch.device) -> int | None:
    """Returns the bytes that can still be had: of the system or this container's limit, or of the GPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    amounts = [amount for amount in (_system_memory(), _container_memory()) if amount is not None]
    return min(amounts, default=None)


def resident_memory() -> int:
    """Returns the bytes of memory that this process holds now, 0 where the system does not tell."""
    for line in _read(_PROC / "self" / "status").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


class CpuWait:
    """A context manager; share: seconds that a thread of this process was ready and had no CPU, for each second inside.

    Not 0 on a machine where other programs run, or with more threads than CPUs. None where the system does not tell.
    """

    share: float | None = None

    def __enter__(self) -> Self:
        self._started, self._waited = time.perf_counter(), waited_seconds()
        return self

    def __exit__(self, *error: object) -> None:
        waited = waited_seconds()
        if waited is not None and self._waited is not None:
            self.share = max(waited - self._waited, 0.0) / (time.perf_counter() - self._started)


def waited_seconds() -> float | None:
    """Returns how long this process' threads were ready to run and had no CPU, added up since they started."""
    waits = [_read(task / "schedstat").split() for task in (_PROC / "self" / "task").glob("*")]
    return sum(int(wait[1]) for wait in waits if len(wait) > 1) / 1e9 if any(waits) else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _system_memory() -> int | None:
    for line in _read(_PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _container_memory() -> int | None:
    most, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if not most.isdigit() or not used.isdigit():
        return None
    files = [
        line.split()[1] for line in _read(_CGROUP / "memory.stat").splitlines() if line.startswith("inactive_file")
    ]
    return int(most) - int(used) + sum(map(int, files))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
