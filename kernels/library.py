"""The native library of the CPU kernels (csrc/, C11, no Python or torch in it), through ctypes.

It is built when the package is installed where there is a C compiler, and carried in the wheel; build.py makes it.
Where it is missing or another version, `load` gives None and `missing` says why and what to do.
"""

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from sparsify.errors import SparsifyError, suggest
from sparsify.kernels.build import library_path

ABI = 2
# Tokens that one call takes: SP_MAX_TOKENS.
MAX_TOKENS = 8
# sp_status
NO_MEMORY = -1
# Linears that one call takes: SP_MAX_SITE.
MAX_SITE = 8
# The instruction set to use instead of the best one that the machine has.
ISA_VARIABLE = "SPARSIFY_ISA"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "relu": 2, "gelu": 3}


class CLinear(Structure):
    """sp_linear."""

    _fields_ = (
        ("weight", c_void_p),
        ("stride", c_int64),
        ("outputs", c_int64),
        ("bias", c_void_p),
        ("threshold", c_void_p),
        ("scale", c_void_p),
        ("lr_a", c_void_p),
        ("lr_b", c_void_p),
        ("rank", c_int64),
        ("kept", c_void_p),
        ("by_rows", c_int64),
    )


class CBlock(Structure):
    """sp_block."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        *((name, CLinear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("cut", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("sequence_stride", c_int64),
        ("head_stride", c_int64),
        ("length", c_int64),
    )


class CDecoder(Structure):
    """sp_decoder."""

    _fields_ = (
        ("dtype", c_int64),
        *((n, c_int64) for n in ("hidden", "heads", "kv_heads", "head_dim", "inner", "vocabulary", "blocks")),
        ("activation", c_int64),
        ("epsilon", c_double),
        ("scaling", c_double),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("head", CLinear),
        ("block", POINTER(CBlock)),
    )


_SIGNATURES = {
    "sp_abi": (c_int, ()),
    "sp_sizeof": (c_int64, (c_int,)),
    "sp_isa": (c_char_p, (c_int,)),
    "sp_use_isa": (c_int, (c_char_p,)),
    "sp_isa_in_use": (c_char_p, ()),
    "sp_cpus": (c_int, ()),
    "sp_site": (c_int, (c_int, c_void_p, c_int64, c_int64, POINTER(CLinear), c_int64, POINTER(c_void_p), c_int)),
    "sp_mlp": (
        c_int,
        (c_int, c_int, c_float, c_void_p, c_int64, c_int64, *(POINTER(CLinear),) * 3, c_void_p, c_int),
    ),
    "sp_decode": (c_int, (POINTER(CDecoder), c_void_p, c_int64, c_void_p, c_void_p, c_int, c_void_p, c_int)),
    "sp_read": (c_int64, (c_void_p, c_int64, c_int)),
    "sp_transpose": (c_int, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int)),
    "sp_forget_mapped": (c_int, (c_void_p, c_int64)),
}


@cache
def load() -> ctypes.CDLL | None:
    """Returns the library, None where it cannot be used; raises SparsifyError for a bad SPARSIFY_ISA."""
    library, _ = _open(library_path())
    if library is not None and os.environ.get(ISA_VARIABLE):
        use_isa(library, os.environ[ISA_VARIABLE])
    return library


@cache
def missing() -> str | None:
    """Returns in one line why there is no library and how to get it; None where there is one."""
    return _open(library_path())[1]


def open_library(path: Path) -> ctypes.CDLL:
    """Opens a library that build.py made somewhere else. Raises SparsifyError where it is not one."""
    library, problem = _open(path)
    if library is None:
        raise SparsifyError(f"{path} is not a library of this sparsify: {problem}")
    return library


def _open(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    how = "`python -m sparsify.kernels.build` makes it, with a C compiler (Debian: apt install gcc)"
    if not path.is_file():
        return None, f"the native CPU kernels are not built: {how}"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as problem:
        return None, f"the native CPU kernels cannot be loaded ({problem}): {how}"
    sizes = [library.sp_sizeof(index) for index in range(3)]
    if library.sp_abi() != ABI or sizes != [ctypes.sizeof(c) for c in (CLinear, CBlock, CDecoder)]:
        return None, f"the native CPU kernels are of another version of sparsify: {how}"
    return library, None


def isas(library: ctypes.CDLL) -> list[str]:
    """Returns the instruction sets that this machine can run, the best first."""
    found: list[str] = []
    while (name := library.sp_isa(len(found))) is not None:
        found.append(name.decode())
    return found


def use_isa(library: ctypes.CDLL, name: str) -> None:
    """Runs the kernels of this instruction set from now on. Raises SparsifyError where the machine has it not."""
    if library.sp_use_isa(name.encode()):
        known = isas(library)
        raise SparsifyError(f"no instruction set {name!r} here: there are {', '.join(known)}.{suggest(name, known)}")
