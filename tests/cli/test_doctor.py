"""`sparsify doctor` and `sparsify methods`."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

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


def _wrong(x: torch.Tensor, site: Sequence[SparseTensors]) -> list[torch.Tensor]:
    return [1.05 * y for y in BACKEND.run(x, site)]


def _raising(x: torch.Tensor, site: Sequence[SparseTensors]) -> list[torch.Tensor]:
    raise RuntimeError("no such instruction")


def _nan(x: torch.Tensor, site: Sequence[SparseTensors]) -> list[torch.Tensor]:
    return [torch.nan * y for y in BACKEND.run(x, site)]


@pytest.mark.parametrize(
    ("kernel", "words"), [(_wrong, "error 5.0e-02"), (_raising, "no such instruction"), (_nan, "nan")]
)
def test_a_broken_backend_fails(run: Run, monkeypatch: pytest.MonkeyPatch, kernel: Any, words: str) -> None:
    broken = dataclasses.replace(BACKEND, name="broken", run=kernel)
    monkeypatch.setattr("sparsify.kernels.dispatch.backends", lambda: (BACKEND, broken))
    result = run("doctor")
    assert result.exit_code == 1
    assert words in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_switch_of_the_entry_point_is_seen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_AUTOLOAD", "0")
    assert json.loads(run("doctor", "--format", "json").stdout)["entry_point"]["switched_off_by"] == [
        "SPARSIFY_AUTOLOAD"
    ]


def test_methods_are_listed_with_their_papers(run: Run) -> None:
    data = json.loads(run("methods", "--format", "json").stdout)["methods"]
    assert {method["name"] for method in data} == set(available())
    shown = run("methods").stdout
    for method in data:
        assert method["paper"] in shown
        assert method["name"] in shown
