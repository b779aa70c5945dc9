"""Work memory: counters that take turns in a ring, memory by torch's allocator."""

import pytest
import torch

from sparsify.errors import SparsifyError
from sparsify.kernels.gpu.scratch import Scratch, scratch_of


def test_counters_are_zero_and_take_turns() -> None:
    scratch = Scratch(torch.device("cpu"), size=10)
    first, second = scratch.counters(4), scratch.counters(6)
    assert first.tolist() == [0] * 4
    assert second.tolist() == [0] * 6
    first.fill_(1)
    assert not second.any()
    # The ring is full: the next turn begins at its start.
    assert scratch.counters(3).data_ptr() == first.data_ptr()


def test_counters_do_not_fall_over_the_end() -> None:
    scratch = Scratch(torch.device("cpu"), size=10)
    scratch.counters(8)
    assert len(scratch.counters(5)) == 5
    assert len(scratch.counters(10)) == 10
    assert scratch.counters(0).numel() == 0


def test_more_counters_than_there_are_is_an_error() -> None:
    with pytest.raises(SparsifyError, match="a launch needs 11 counters, there are 10"):
        Scratch(torch.device("cpu"), size=10).counters(11)


def test_counters_are_aligned_alike() -> None:
    """Triton compiles a kernel once more for a pointer that is not a multiple of 16 bytes."""
    scratch = Scratch(torch.device("cpu"), size=200)
    assert all(scratch.counters(number).data_ptr() % 16 == 0 for number in (86, 1, 3, 48, 50, 7))


def test_memory_has_the_dtype_and_the_device(device: torch.device) -> None:
    memory = Scratch(device, size=1).empty(7, torch.bfloat16)
    assert (memory.shape, memory.dtype, memory.device) == ((7,), torch.bfloat16, device)


def test_calls_on_a_device_share_one() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert scratch_of(cpu) is scratch_of(cpu)
    assert scratch_of(cpu) is not scratch_of(meta)


@pytest.mark.gpu
def test_a_first_run_inside_a_capture_is_refused(device: torch.device) -> None:
    """Zeros that are made while a graph is captured are made again in every replay, over counters in use."""
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(SparsifyError, match="run the model once before"), torch.cuda.graph(graph):
        Scratch(device)
