"""A small stream, so that measurements of tiny models take no time."""

import pytest

from sparsify.evals import cold_calls, stream


@pytest.fixture
def small_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of 64 kB and two copies of each weight."""
    monkeypatch.setattr(stream, "_LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(stream, "cache_of", lambda device: None)
    monkeypatch.setattr(cold_calls, "last_level_cache", lambda: None)
