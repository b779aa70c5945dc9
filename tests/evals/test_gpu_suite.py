"""The GPU suite without a GPU: its order, its time, what it refuses, and that nothing written is lost."""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sparsify.errors import UnavailableError
from sparsify.evals import gpu_suite
from sparsify.evals.gpu_suite import main, run_suite, table

_ABOUT = {"device": "Test GPU 9", "date": "2026-01-02", "versions": {"torch": "1"}, "gpu": {"capability": "9.9"}}
_PASSED = '<testsuites><testsuite><testcase classname="tests.gpu.test_a" name="b"/></testsuite></testsuites>'
_FAILED = _PASSED.replace("/></testsuite>", "><failure/></testcase></testsuite>")


def _cell(context: int, ratio: float) -> dict[str, Any]:
    spread = {"median": 1.0, "p10": 0.9, "p90": 1.1}
    side = {
        "sparse": False, "touched": {"realised_sparsity": 0.0}, "ms_per_step": spread, "gb_per_second": 3000.0,
        "share_of_stream": spread,
    }  # fmt: skip
    sparse = {**side, "sparse": True, "touched": {"realised_sparsity": 0.5}}
    ours = {"dense-rows": {"median": ratio}, "dense": {"median": 2.0}, "sparse-50": {"median": 1.0}}
    return {
        "context": context, "batch": 1, "best_dense": "dense", "left_out": {"compiled": "torch.compile failed: no"},
        "sides": {"sparse-50": sparse, "dense": side, "dense-rows": side},
        "ratios": {"sparse-50": ours, "dense": ours, "dense-rows": ours},
    }  # fmt: skip


class FakeRuns:
    """Stages that write what they would write, and a clock that goes on by what each takes."""

    def __init__(self, tests: str = _PASSED, broken: str = "") -> None:
        self.tests, self.broken = tests, broken
        self.now = 0.0
        self.begun: list[tuple[str, float, dict[str, str]]] = []

    def __call__(self, command: Sequence[str], seconds: float, variables: Mapping[str, str]) -> str | None:
        assert command[:2] == [sys.executable, "-m"]
        module = command[2].removeprefix("sparsify.evals.")
        self.begun.append((module, seconds, dict(variables)))
        self.now += 0.9 * seconds
        if module == self.broken:
            return "exit code 3"
        values = dict(pairwise(command))
        if module == "pytest":
            results = next(part for part in command if part.startswith("--junitxml="))
            Path(results.partition("=")[2]).write_text(self.tests)
        elif module in ("tuning", "gpu_kernel_speed"):
            assert 0 < float(values["--seconds"]) < seconds or seconds < 20
        if module == "tuning":
            (Path(values["--out"]) / "test-gpu-9.json").write_text('{"tiles": {}}')
        elif module == "gpu_decode_speed":
            assert float(values["--seconds"]) < seconds
            cells = [_cell(128, 1.7), _cell(1024, 1.6)]
            document = {
                "shape": values["--shape"], "cells": cells, "protocol": "p", **_ABOUT,
                "not_run": [{"context": 4096, "batch": 8, "reason": "no time was left"}],
            }  # fmt: skip
            Path(values["--save"]).write_text(json.dumps(document))
        return None


def _suite(out: Path, fake: FakeRuns, **settings: Any) -> dict[str, Any]:
    return run_suite(out, run=fake, about=_ABOUT, clock=lambda: fake.now, **settings)


def test_stages_follow_each_other_within_the_time(tmp_path: Path) -> None:
    fake = FakeRuns()
    document = _suite(tmp_path, fake, minutes=9.0)
    assert [name for name, _, _ in fake.begun] == ["pytest", "tuning", "gpu_kernel_speed", *["gpu_decode_speed"] * 3]
    assert fake.now <= 540
    # Tiles that were tuned are used by what comes after.
    assert [variables for _, _, variables in fake.begun] == [{}] * 2 + [{"SPARSIFY_TILES": str(tmp_path)}] * 4
    assert document == json.loads((tmp_path / "suite.json").read_text())
    assert document["tests"] == {"passed": 1, "skipped": 0, "failed": []}
    assert list(document["decode"]) == ["llama-3-8b", "llama-2-7b", "llama-3.2-1b"]


def test_a_table_that_is_there_is_not_tuned_again(tmp_path: Path) -> None:
    (tmp_path / "test-gpu-9.json").write_text('{"tiles": {}}')
    fake = FakeRuns()
    _suite(tmp_path, fake, shapes=["llama-3-8b"])
    assert [name for name, _, _ in fake.begun] == ["pytest", "gpu_kernel_speed", "gpu_decode_speed"]
    assert all(variables for _, _, variables in fake.begun)


@pytest.mark.parametrize(
    ("tests", "said"),
    [(_FAILED, "1 tests of whole models failed"), ("", "not timed: no test ran")],
    ids=["failed", "none"],
)
def test_what_is_wrong_is_not_timed(tests: str, said: str, tmp_path: Path) -> None:
    fake = FakeRuns(tests)
    document = _suite(tmp_path, fake)
    assert "gpu_decode_speed" not in [name for name, _, _ in fake.begun]
    assert document["decode"] == {}
    assert all(said in problem["what"] for problem in document["problems"])
    assert "not measured" in table(document)


def test_a_broken_stage_leaves_the_others(tmp_path: Path) -> None:
    fake = FakeRuns(broken="tuning")
    document = _suite(tmp_path, fake)
    assert document["problems"] == [{"stage": "tune", "what": "exit code 3"}]
    assert len(document["decode"]) == 3
    # Results of an earlier run are not taken for those of this one.
    fake = FakeRuns(broken="gpu_decode_speed")
    assert set(_suite(tmp_path, fake)["decode"].values()) == {None}


def test_the_table_says_what_was_asked_for_and_what_was_found(tmp_path: Path) -> None:
    text = table(_suite(tmp_path, FakeRuns()))
    assert "# Test GPU 9, 2026-01-02" in text
    # Against the dense sides that are not our own kernels.
    assert "| llama-3-8b, sparse-50 | 1.65× | 1.70× | met |" in text
    assert "| llama-3-8b, sparse-70 | 2.20× | not measured |  |" in text
    assert "| llama-2-7b, sparse-50 | 1.70× | 1.70× | met |" in text
    assert "not timed: torch.compile failed: no" in text
    assert "Not run: context 4096, batch 8: no time was left." in text
    assert "| 128 | 1 | sparse-50 | 50% | 1.000 |" in text


def test_a_process_that_fails_or_takes_too_long_is_said(tmp_path: Path) -> None:
    run = gpu_suite._process
    assert run([sys.executable, "-c", "import sparsify.evals.gpu_suite"], 60, {}) is None
    assert run([sys.executable, "-c", "raise SystemExit(7)"], 60, {}) == "exit code 7"
    assert "stopped after 0 s" in str(run([sys.executable, "-c", "import time; time.sleep(30)"], 0.3, {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnavailableError, match="the GPU suite needs a GPU"):
        run_suite(tmp_path / "out")
    assert main(["--out", str(tmp_path / "out")]) == 4
    assert "error: the GPU suite needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
