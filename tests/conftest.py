"""Settings and fixtures of every test: offline, few threads, uninitialised memory that cannot pass for a result."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or transformers, and inherited by the processes that tests start.
_NO_GPU = not Path("/dev/nvidiactl").exists()
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    # Without a GPU, Triton kernels run in its interpreter.
    **({"TRITON_INTERPRET": "1"} if _NO_GPU else {}),
}.items():
    os.environ.setdefault(_name, _value)

import pytest
import torch

_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return _ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and texts outside the repository; a test that needs it is skipped where it is not."""
    folder = Path(os.environ.get("SPARSIFY_SHARED_DATA") or _ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no models and texts in {folder}; SPARSIFY_SHARED_DATA can name another folder")
    return folder


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that a value nobody wrote shows in the result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
