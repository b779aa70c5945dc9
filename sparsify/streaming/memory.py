"""Memory that was freed, given back to the system: glibc keeps what lies between pieces that are still in use."""

import ctypes
import sys


def give_back() -> None:
    """Returns free pages of the heap; without it, a process holds a block or two that it does not need any more."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
