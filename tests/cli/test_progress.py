"""Progress on a stream that is no terminal: few lines, each whole, with the time left."""

import io
import re

from sparsify.cli.progress import Progress


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_log_lines_come_every_few_seconds_with_the_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock=clock) as progress:
        for done in range(1, 21):
            clock.now += 1
            progress("calibrate", done, 20)
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 6
    assert all(re.match(r"\d\d:\d\d:\d\d calibrate: \d+/20, ", line) for line in lines)
    assert "left" in lines[0]
    assert lines[-1].endswith("calibrate: 20/20, done in 20.0 s")


def test_short_stages_get_one_line_each() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock=clock) as progress:
        for name in ("dense", "sparse"):
            stage = progress.stage(name)
            for done in (1, 2, 2):
                clock.now += 0.3
                stage(done, 2)
    lines = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert lines == ["dense: 2/2, done in 0.6 s", "sparse: 2/2, done in 0.6 s"]


def test_a_slow_first_step_is_said_at_once() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock=clock) as progress:
        clock.now += 60
        progress("calibrate", 1, 3)
    assert stream.getvalue().endswith("calibrate: 1/3, about 2 min 00 s left\n")


def test_a_terminal_gets_bars() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(stream) as progress:
        progress("calibrate", 1, 2)
        progress.note("reading the model")
    assert "calibrate" in stream.getvalue()
    assert "1/2" in stream.getvalue()
    assert "reading the model" in stream.getvalue()
