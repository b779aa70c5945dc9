"""`sparsify doctor` and `sparsify methods`."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sparsify.kernels import library, native
from sparsify.kernels.dispatch import backends
from sparsify.kernels.reference import BACKEND
from sparsify.kernels.spec import SparseTensors
from sparsify.methods import available

Run = Any


def test_a_sound_installation_passes(run: Run) -> None:
    result = run("doctor", "--format", "json")
    data = json.loads(result.stdout)
    assert (result.exit_code, data["passed"], data["hub"]) == (0, True, None)
    assert {(test["backend"], test["dtype"]) for test in data["self_tests"]} >= {
        ("reference", "float32"), ("reference", "bfloat16"), ("reference", "float16"),
    }  # fmt: skip
    assert data["versions"]["torch"] == torch.__version__


@pytest.fixture
def loaded() -> Any:
    """The native library; a test that needs it is skipped where there is none."""
    if library.load() is None:
        pytest.skip(str(library.missing()))
    return library.load()


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape for the self-tests where they are not what is tested: a quarter of the time."""
    monkeypatch.setattr("sparsify.evals.self_test._SHAPES", ((64, 64),))


def test_every_kernel_is_tested_with_every_instruction_set(run: Run, loaded: Any) -> None:
    before = loaded.sp_isa_in_use()
    data = json.loads(run("doctor", "--format", "json").stdout)
    tests = [test for test in data["self_tests"] if test["backend"] == "native"]
    isas, dtypes = library.isas(loaded), ("float32", "bfloat16", "float16")
    assert {(test["kernel"], test["isa"], test["dtype"]) for test in tests} >= {
        (kernel, isa, dtype) for kernel in ("linear", "mlp") for isa in isas for dtype in dtypes
    }
    assert loaded.sp_isa_in_use() == before


def test_cpu_kernels_are_named(run: Run, few_cases: None, loaded: Any) -> None:
    kernels = json.loads(run("doctor", "--format", "json").stdout)["cpu_kernels"]
    assert kernels == {
        "backend": "native",
        "isa": loaded.sp_isa_in_use().decode(),
        "isas": library.isas(loaded),
        "threads": torch.get_num_threads(),
        "allowed_cpus": len(os.sched_getaffinity(0)),
        "missing": None,
    }
    shown = run("doctor").stdout
    assert "native backend" in shown
    assert f"instruction set {kernels['isa']}, of {', '.join(kernels['isas'])}" in shown


def test_missing_library_is_one_line_and_no_failure(run: Run, few_cases: None, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "the native CPU kernels are not built: here is how"
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "missing", lambda: line)
    data = json.loads(run("doctor", "--format", "json").stdout)
    assert data["passed"]
    assert {test["backend"] for test in data["self_tests"]} == {"reference"}
    assert (data["cpu_kernels"]["backend"], data["cpu_kernels"]["missing"]) == ("reference", line)
    shown = run("doctor")
    assert line in shown.stdout
    assert line not in shown.stderr


def test_broken_instruction_set_is_named(
    run: Run, few_cases: None, monkeypatch: pytest.MonkeyPatch, loaded: Any
) -> None:
    def wrong_in_portable(x: torch.Tensor, site: Sequence[SparseTensors]) -> list[torch.Tensor]:
        y = native.run(x, site)
        return [1.05 * part for part in y] if loaded.sp_isa_in_use() == b"portable" else y

    broken = dataclasses.replace(native.BACKEND, run=wrong_in_portable)
    monkeypatch.setattr(native, "BACKEND", broken)
    monkeypatch.setattr("sparsify.kernels.dispatch.backends", lambda: (broken, BACKEND))
    data = json.loads(run("doctor", "--format", "json").stdout)
    failed = [test for test in data["self_tests"] if not test["passed"]]
    assert {(test["backend"], test["isa"], test["kernel"]) for test in failed} == {("native", "portable", "linear")}
    shown = run("doctor")
    assert shown.exit_code == 1
    assert "native portable linear on cpu in float32: [64, 64], 1 tokens, density" in " ".join(shown.stdout.split())
    assert max(map(len, shown.stdout.splitlines())) <= 80


def _wrong(x: torch.Tensor, site: Sequence[SparseTensors]) -> list[torch.Tensor]:
    return [1.05 * y for y in BACKEND.run(x, site)]


def _raising(x: torch.Tensor, site: Sequence[SparseTensors]) -> list[torch.Tensor]:
    raise RuntimeError("no such instruction")


def _nan(x: torch.Tensor, site: Sequence[SparseTensors]) -> list[torch.Tensor]:
    return [torch.nan * y for y in BACKEND.run(x, site)]


@pytest.mark.parametrize(
    ("kernel", "words"), [(_wrong, "error 5.0e-02"), (_raising, "no such instruction"), (_nan, "nan")]
)
def test_a_broken_backend_fails(
    run: Run, few_cases: None, monkeypatch: pytest.MonkeyPatch, kernel: Any, words: str
) -> None:
    broken = dataclasses.replace(BACKEND, name="broken", run=kernel)
    monkeypatch.setattr("sparsify.kernels.dispatch.backends", lambda: (BACKEND, broken))
    result = run("doctor")
    assert result.exit_code == 1
    assert words in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_switch_of_the_entry_point_is_seen(run: Run, few_cases: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_AUTOLOAD", "0")
    assert json.loads(run("doctor", "--format", "json").stdout)["entry_point"]["switched_off_by"] == [
        "SPARSIFY_AUTOLOAD"
    ]


def test_methods_are_listed_with_their_papers(run: Run) -> None:
    found = json.loads(run("methods", "--format", "json").stdout)
    data = found["methods"]
    assert {method["name"] for method in data} == set(available())
    shown = " ".join(run("methods").stdout.split())
    for method in data:
        assert method["name"] in shown
        assert method["choice"] in ("static", "per-prompt", "per-token")
        assert set(method["kernels"]) <= {backend.name for backend in backends()}
        for fact in (method["paper"], method["sparsifies"], method["choice"], method["rule"]):
            assert fact in shown
    flags = run("convert", "--help").stdout
    for way in found["ways"]:
        assert way["summary"] in shown
        assert all(f"--{option}" in flags for option in way["options"])
