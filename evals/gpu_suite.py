"""The GPU suite: whether every kernel is right on this GPU, then how fast kernels and whole models are. `make gpu`.

    python -m sparsify.evals.gpu_suite --out docs/results/gpu

Correctness first: the kernels' and the decode step's own tests, on the device. Then tiles are tuned, unless there is a
table for the device, kernels are timed by themselves, and whole models decode. Every stage is a process of its own, so
that a fault in one leaves the others a working device, and writes its results while it runs. What failed its check is
not timed. Needs torch, triton, transformers, safetensors and pytest, no network, and a GPU that does nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals import gpu_decode_speed, gpu_kernel_table
from sparsify.evals.machine import environment

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("llama-3-8b", "llama-2-7b", "llama-3.2-1b")
_MINUTES = 9.5
_TESTS = ("tests/kernels/gpu", "tests/gpu")
# What a stage may take of the time that is left when it begins, and at most, in seconds.
_SHARES = {"tests": (0.5, 240), "tune": (0.25, 75), "kernels": (0.3, 90)}
# A stage ends by itself before it is stopped.
_GRACE = 20
# What the project asked for on one H200 at batch 1 (128 tokens of context): side, shape, the least ratio to the best
# dense side of the run.
TARGETS = (
    ("dense", "llama-3-8b", 0.97),
    ("dense", "llama-2-7b", 0.97),
    ("sparse-50", "llama-3-8b", 1.65),
    ("sparse-70", "llama-3-8b", 2.2),
    ("sparse-50", "llama-2-7b", 1.7),
)
Run = Callable[[Sequence[str], float, Mapping[str, str]], str | None]


class Report:
    """What the suite found, written down after every change."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.document: dict[str, Any] = {**about, "tests": None, "tuning": None, "kernels": None, "decode": {}}
        self.document["problems"] = []
        self.write()

    def write(self) -> None:
        """Replaces the file as a whole: a suite that is cut off leaves what was there."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.path)

    def problem(self, stage: str, what: str) -> None:
        """Writes down what went wrong in a stage."""
        self.document["problems"].append({"stage": stage, "what": what})
        self.write()


def run_suite(
    out: Path,
    *,
    minutes: float = _MINUTES,
    shapes: Sequence[str] = SHAPES,
    teal: Path | None = None,
    tune: bool = True,
    run: Run | None = None,
    about: Mapping[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Runs all stages within the minutes and returns the document, which stands in out/suite.json.

    teal: a checkout of TEAL's public code to time beside ours; run: how a stage is run, a process where None; about:
    what the device is, asked where None. Raises UnavailableError without a GPU.
    """
    about = _device() if about is None else about
    out.mkdir(parents=True, exist_ok=True)
    suite = _Suite(Report(out / "suite.json", about), out, clock() + 60 * minutes, run or _process, clock)
    suite.tests()
    if tune:
        suite.tune(shapes)
    suite.kernels(shapes, teal)
    failed = [name for name in suite.report.document["tests"]["failed"] if name.startswith("tests.gpu")]
    for number, shape in enumerate(shapes):
        if failed:
            suite.report.problem(shape, f"not timed: {len(failed)} tests of whole models failed")
        elif not suite.report.document["tests"]["passed"]:
            suite.report.problem(shape, "not timed: no test ran")
        else:
            suite.decode(shape, share=1 / (len(shapes) - number), compiled=number == 0)
    return suite.report.document


@dataclass
class _Suite:
    """The stages, each of which adds to the report. until: when the last one has to be over, by the clock."""

    report: Report
    out: Path
    until: float
    run: Run
    clock: Callable[[], float]

    @property
    def tiles(self) -> Path:
        """The table of tiles for this device."""
        from sparsify.kernels.gpu.tiles import file_name

        return self.out / file_name(self.report.document["device"])

    def tests(self) -> None:
        file = self.out / "tests.xml"
        arguments = ["-m", "pytest", "-q", *_TESTS, "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={file}"]
        self._run("tests", arguments, file, self._seconds("tests"))
        self.report.document["tests"] = _outcome(file)
        self.report.write()

    def tune(self, shapes: Sequence[str]) -> None:
        """Looks for tiles of one token, unless a table is there: tuned ones are used by the stages after it."""
        if not self.tiles.is_file():
            seconds = self._seconds("tune")
            arguments = ["-m", "sparsify.evals.tuning", "--out", str(self.out), "--seconds", _inside(seconds)]
            self._run("tune", [*arguments, "--tokens", "1", "--model", *shapes], self.tiles, seconds)
        self.report.document["tuning"] = _read(self.tiles)
        self.report.write()

    def kernels(self, shapes: Sequence[str], teal: Path | None) -> None:
        file, seconds = self.out / "kernels.json", self._seconds("kernels")
        arguments = ["-m", "sparsify.evals.gpu_kernel_speed", "--model", *shapes, "--rounds", "7", "--save", str(file)]
        arguments += ["--seconds", _inside(seconds), *(["--teal", str(teal)] if teal is not None else [])]
        self._run("kernels", arguments, file, seconds)
        self.report.document["kernels"] = _read(file)
        self.report.write()

    def decode(self, shape: str, *, share: float, compiled: bool) -> None:
        file, seconds = self.out / f"{shape}.json", max(1.0, share * (self.until - self.clock()))
        arguments = ["-m", "sparsify.evals.gpu_decode_speed", "--shape", shape, "--save", str(file)]
        arguments += ["--seconds", _inside(seconds), *(["--compiled"] if compiled else [])]
        self._run(shape, arguments, file, seconds)
        self.report.document["decode"][shape] = _read(file)
        self.report.write()

    def _seconds(self, stage: str) -> float:
        share, most = _SHARES[stage]
        return max(1.0, min(share * (self.until - self.clock()), most))

    def _run(self, name: str, arguments: Sequence[str], file: Path, seconds: float) -> None:
        """Runs one process; what an earlier suite wrote is not taken for its results."""
        file.unlink(missing_ok=True)
        print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
        variables = {"SPARSIFY_TILES": str(self.out)} if self.tiles.is_file() else {}
        problem = self.run([sys.executable, *arguments], seconds, variables)
        if problem is not None:
            self.report.problem(name, problem)


def table(document: Mapping[str, Any]) -> str:
    """Returns what the suite found as markdown: tests, targets, whole models, kernels, problems."""
    tests = document["tests"] or {"passed": 0, "skipped": 0, "failed": ["no result"]}
    lines = [
        f"# {document['device']}, {document['date']}",
        "",
        f"Versions: {', '.join(f'{name} {value}' for name, value in document['versions'].items())}.",
        f"Tests on the device: {tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed.",
        *(f"- failed: {name}" for name in tests["failed"]),
        *(f"- {entry['stage']}: {entry['what']}" for entry in document["problems"]),
        "",
        *_targets(document),
    ]
    for found in document["decode"].values():
        if found is not None:
            lines += ["", "## Decoding, " + gpu_decode_speed.table(found)]
    if document["kernels"] is not None:
        lines += ["", "## Kernels by themselves", "", gpu_kernel_table.table(document["kernels"])]
    return "\n".join(lines)


def _targets(document: Mapping[str, Any]) -> list[str]:
    lines = ["| asked at batch 1, 128 tokens of context | at least | measured | |", "|---|---|---|---|"]
    for side, shape, least in TARGETS:
        cells = (document["decode"].get(shape) or {}).get("cells", [])
        cell = next((c for c in cells if (c["context"], c["batch"]) == (128, 1)), None)
        found = None
        if cell is not None and side in cell["sides"]:
            # The best dense side but our own kernels at 0%: what they are held against.
            others = [name for name in cell["sides"] if not cell["sides"][name]["sparse"] and name != "dense"]
            best = min(others, key=lambda name: float(cell["sides"][name]["ms_per_step"]["median"]), default=None)
            found = None if best is None else float(cell["ratios"][side][best]["median"])
        said = "not measured" if found is None else f"{found:.2f}×"
        met = "" if found is None else ("met" if found >= least else "not met")
        lines.append(f"| {shape}, {'our kernels at 0%' if side == 'dense' else side} | {least:.2f}× | {said} | {met} |")
    return lines


def _device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise UnavailableError("the GPU suite needs a GPU that torch can use, and there is none here")
    return environment(torch.device("cuda", torch.cuda.current_device()))


def _inside(seconds: float) -> str:
    """The seconds that a stage is told, so that it ends by itself."""
    return str(max(1, round(seconds - _GRACE)))


def _process(command: Sequence[str], seconds: float, variables: Mapping[str, str]) -> str | None:
    """Runs a stage; returns what went wrong, None where nothing did. Its output goes where ours goes."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **variables}, timeout=seconds, check=False,
            stdout=sys.stderr,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s; what it had written by then is kept"
    return None if done.returncode == 0 else f"exit code {done.returncode}"


def _outcome(results: Path) -> dict[str, Any]:
    """Returns how many tests passed and were skipped, and the names of those that failed."""
    try:
        cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {"passed": 0, "skipped": 0, "failed": ["the tests left no result"]}
    failed = [
        f"{c.get('classname')}::{c.get('name')}"
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 where everything ran and every test passed, else 1, 4 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.gpu_suite", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder for suite.json, suite.md and tiles"
    )
    parser.add_argument("--minutes", type=float, default=_MINUTES, help=f"for all stages together; default {_MINUTES}")
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), metavar="NAME")
    parser.add_argument("--teal", type=Path, metavar="FOLDER", help="a checkout of TEAL's code, timed beside ours")
    parser.add_argument("--no-tune", action="store_true", help="time with the tiles that are there")
    given = parser.parse_args(arguments)
    try:
        document = run_suite(
            given.out, minutes=given.minutes, shapes=given.shape, teal=given.teal, tune=not given.no_tune
        )
    except SparsifyError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    text = table(document)
    (given.out / "suite.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if document["problems"] or document["tests"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
