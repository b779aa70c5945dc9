"""The measured stream: what it moves and by what."""

import pytest
import torch

from sparsify.errors import UnavailableError
from sparsify.evals import stream
from sparsify.evals.stream import Stream, require_native
from sparsify.kernels import library

_CPU = torch.device("cpu")


def test_the_buffer_exceeds_the_cache_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "cache_of", lambda device: 1 << 18)
    monkeypatch.setattr(stream, "_LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(library, "load", lambda: None)
    copy = Stream(_CPU)
    # Without the library a copy, which counts what it reads and what it writes.
    assert (copy.kind, copy.size) == ("copy", 2 * (4 << 18))
    assert copy.gb_per_second()[0] > 0
    monkeypatch.setattr(stream, "cache_of", lambda device: None)
    assert Stream(_CPU).size == 2 << 16


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
def test_the_native_library_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "cache_of", lambda device: None)
    monkeypatch.setattr(stream, "_LEAST_BYTES", 1 << 20)
    read = Stream(_CPU)
    assert (read.kind, read.size) == ("read", 1 << 20)
    assert read.seconds() > 0
    assert len(read.gb_per_second()) == 1


def test_what_is_of_native_kernels_only_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing", lambda: "not built: do this")
    with pytest.raises(UnavailableError, match="not built: do this"):
        require_native()
