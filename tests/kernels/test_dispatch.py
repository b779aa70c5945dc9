"""Which backend is chosen, and what is said where a better one lacks something."""

import dataclasses
import logging
from collections.abc import Iterator

import pytest
import torch

from sparsify.errors import SparsifyError
from sparsify.kernels import dispatch, library, native, reference
from sparsify.kernels.build import library_path
from sparsify.linear import SparseLinear, SparsitySwitch

_CPU = torch.device("cpu")
_LINE = "the native CPU kernels are not built: here is how"


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "missing", lambda: _LINE)
    dispatch._warn_once.cache_clear()
    yield
    dispatch._warn_once.cache_clear()


def _choose(dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> str:
    return dispatch.select_backend(device, dtype, 64, 64).name


def test_backends_are_found_by_priority_and_the_library_is_none() -> None:
    assert [backend.name for backend in dispatch.backends()][-2:] == ["native", "reference"]
    # The library's file looks like an extension module, which Python would try to import.
    assert library_path().suffix == ".so"


def test_native_is_chosen_where_it_can_run() -> None:
    if library.load() is None:
        pytest.skip(str(library.missing()))
    assert {_choose(dtype) for dtype in library.DTYPES} == {"native"}
    assert _choose(torch.float64) == "reference"
    assert _choose(device=torch.device("meta")) == "reference"


def test_missing_library_is_said_once_however_many_layers(no_library: None, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        layer = SparseLinear(8, 8, True, scaled=False, rank=0, switch=SparsitySwitch())
        assert layer.backend is reference.BACKEND
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, _LINE)]


def test_missing_library_is_not_said_where_it_would_not_help(
    no_library: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert _choose(torch.float64) == "reference"
    assert _choose(device=torch.device("meta")) == "reference"
    assert dispatch.select_backend(_CPU, torch.float32, 64, 64, name="reference").name == "reference"
    assert dispatch.preferred_backend(_CPU, torch.float32, 64, 64).name == "reference"
    assert not caplog.records


def test_missing_library_by_name_is_an_error(no_library: None) -> None:
    with pytest.raises(SparsifyError, match="backend 'native' does not support"):
        dispatch.select_backend(_CPU, torch.float32, 64, 64, name="native")


def test_what_a_less_preferred_backend_lacks_is_not_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = dataclasses.replace(native.BACKEND, priority=-10, missing=lambda device, dtype: _LINE)
    monkeypatch.setattr(dispatch, "backends", lambda: (reference.BACKEND, lacking))
    assert _choose() == "reference"
    assert not caplog.records
