"""The memory that a plan predicts, against the peak of a fresh process that converts, on Linux."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.evals.shapes import save_random

_PROGRAM = """
import sys
from sparsify.cli.main import build_app

build_app()(sys.argv[1:], standalone_mode=False)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM:"):
        print("peak", int(line.split()[1]) * 1024, file=sys.stderr)
"""
_FLAGS = ("--method", "teal", "--sequences", "2", "--seq-len", "64", "--eval-windows", "1", "--format", "json")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's /proc")
def test_the_peak_is_the_predicted_one(tmp_path: Path) -> None:
    folder = save_random("llama-100m", tmp_path / "dense")
    flags = [str(folder), *_FLAGS]
    planned = _run("plan", *flags)
    converted = _run("convert", *flags, "--out", str(tmp_path / "out"))
    peak = int(converted.stderr.rpartition("peak ")[2])
    memory = json.loads(planned.stdout)["memory"]
    assert memory["weights"] > 190e6
    # Four times the weights at the end, beside what the interpreter holds.
    assert 0.8 * peak <= memory["peak"] <= 1.4 * peak
    assert memory["streamed_peak"] < memory["needed"] < memory["peak"]


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done
