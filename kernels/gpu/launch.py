"""Where every kernel is launched: on its tensors' device or, while launches are counted, nowhere.

Counting needs no GPU and no memory: on meta tensors a whole decode step of a 70B model is counted in a moment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name and its programs."""

    kernel: str
    grid: tuple[int, ...]

    @property
    def programs(self) -> int:
        return prod(self.grid)


_counted: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches a Triton kernel, or writes the launch down where they are counted."""
    if _counted is not None:
        _counted.append(Launch(kernel.fn.__name__, grid))
        return
    kernel[grid](*arguments, **constants)


@contextmanager
def counted() -> Iterator[list[Launch]]:
    """Inside, launches are added to the list that it gives, and nothing runs: outputs hold no values."""
    global _counted
    before, _counted = _counted, []
    try:
        yield _counted
    finally:
        _counted = before
