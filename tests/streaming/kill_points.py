"""Kills a streamed conversion with SIGKILL at each of its write points and resumes it; one JSON line at the end.

A process of its own, with one thread: its children are forks that share its imports. Called with the folder of a dense
model and an empty folder to work in.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sparsify
import sparsify.weight_files
from sparsify.streaming.shards import Shards
from tests.streaming.conftest import Setting, contents, random_tokens

# What changes the disk, as Python's audit hooks name it; fsync and pwrite have no audit event and are wrapped.
_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.replace"}


def watch(see: Callable[[str], None]) -> None:
    """Calls see before each operation that changes the disk."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        if event in _EVENTS or flags & (os.O_WRONLY | os.O_RDWR):
            see(event)

    for name in ("fsync", "pwrite"):
        real = getattr(os, name)

        def seen(*arguments: Any, name: str = name, real: Any = real) -> Any:
            see(name)
            return real(*arguments)

        setattr(os, name, seen)
    sys.addaudithook(hook)


def in_child(work: Callable[[], None]) -> int:
    """Runs work in a forked process and returns its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main(model: Path, work: Path, limit: int, begin: int = 1) -> None:
    """limit: the largest model that is one file. Of a single file only the points of its making are tried."""
    sparsify.weight_files.SINGLE_FILE_BYTES = limit
    setting = Setting(model, sparsify.Teal(sparsity=0.5), random_tokens(windows=1, length=8))
    # What is imported on first use, and compared with in the end.
    setting.stream(work / "whole" / "out")
    whole = {f"out/{name}": data for name, data in contents(work / "whole" / "out").items()}

    def count() -> None:
        events: list[str] = []
        watch(events.append)
        real = Shards.assemble

        def assemble(self: Shards, units: Any) -> None:
            events.append("assemble")
            real(self, units)

        Shards.assemble = assemble  # type: ignore[method-assign]
        setting.stream(work / "counted" / "out")
        (work / "events").write_text(json.dumps(events))

    (work / "counted").mkdir()
    assert in_child(count) == 0
    events = json.loads((work / "events").read_text())
    first = events.index("assemble")
    events.remove("assemble")
    points = range(begin if limit == 0 else first + 1, len(events) + 1)
    problems = [problem for point in points if (problem := try_point(setting, work / str(point), point, whole))]
    named = [f"{events[int(problem.split()[0]) - 1]}: {problem}" for problem in problems]
    digest = hashlib.sha256(b"".join(name.encode() + whole[name] for name in sorted(whole))).hexdigest()
    print(json.dumps({"points": len(points), "events": len(events), "problems": named, "sha256": digest}))


def try_point(setting: Setting, folder: Path, point: int, whole: dict[str, bytes]) -> str | None:
    """Kills a conversion at one point and resumes it; returns what is wrong then."""
    seen = 0

    def see(event: str) -> None:
        nonlocal seen
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def convert() -> None:
        watch(see)
        setting.stream(folder / "out")

    folder.mkdir()
    status = in_child(convert)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        return f"{point} was not killed"
    finished = contents(folder).items() >= whole.items()
    resumed = in_child(lambda: setting.stream(folder / "out", resume=True) and None) == 0
    # Killed when only leftovers were to be removed: a resume says that the folder is there, and removes them.
    if not resumed and not finished:
        return f"{point} was not resumed"
    left = contents(folder) != whole or [path.name for path in folder.iterdir()] != ["out"]
    return f"{point} left other files" if left else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
