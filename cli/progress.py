"""Progress of long work, on stderr: bars with the time left on a terminal, a log line every few seconds otherwise."""

import sys
import time
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from sparsify.cli.output import seconds
from sparsify.launch import launched_index

Callback = Callable[[int, int], None]
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_TO_FIRST_LINE = 1.0


class Progress:
    """Shows the stages of one command; `stage(name)` is the `progress(done, total)` callback that work takes."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        # Of several processes the first says how far they are: all have as much to do.
        self._silent = launched_index() > 0
        self._clock = clock
        self._bars = _bars(self._stream) if self._stream.isatty() and not self._silent else None
        self._tasks: dict[str, TaskID] = {}
        # Of the last call of any kind: what the next stage's first step is measured from.
        self._last = clock()
        self._started: dict[str, float] = {}
        self._due: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str) -> Callback:
        """Returns the callback of one stage."""
        return lambda done, total: self(name, done, total)

    def note(self, message: str) -> None:
        """Says what goes on where there is nothing to count."""
        if self._bars is not None:
            self._bars.console.print(message, highlight=False, style="dim")
        else:
            self._line(message)
            self._last = self._clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Takes that `done` of `total` steps of a stage are done."""
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
        else:
            self._log(stage, done, total)

    def _log(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        started = self._started.setdefault(stage, self._last)
        self._last = now
        due = self._due.setdefault(stage, started + _SECONDS_TO_FIRST_LINE)
        if done >= total:
            if due != float("inf"):
                self._line(f"{stage}: {done}/{total}, done in {seconds(now - started)}")
            self._due[stage] = float("inf")
        elif now >= due:
            left = f", about {seconds((now - started) / done * (total - done))} left" if done else ""
            self._line(f"{stage}: {done}/{total}{left}")
            self._due[stage] = now + _SECONDS_BETWEEN_LINES

    def _line(self, message: str) -> None:
        if self._silent:
            return
        self._stream.write(f"{datetime.now().strftime('%H:%M:%S')} {message}\n")
        self._stream.flush()


def _bars(stream: TextIO) -> Bars:
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream, highlight=False),
    )
