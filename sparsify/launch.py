"""What a launcher said to a process that it started: how many there are, and which this one is."""

import os

# How launchers tell a process how many there are: torchrun and accelerate, then the MPIs that accelerate knows.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def launched_count() -> int:
    """Returns how many processes the launcher of this one said that there are; 1 without a launcher."""
    return next((count for name in _COUNTS if (count := _number(name)) is not None), 1)


def launched_index() -> int:
    """Returns which of them this is, from 0."""
    return next((rank for name in _RANKS if (rank := _number(name)) is not None), 0)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None
