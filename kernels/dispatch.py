"""Finds the backends, one file each in this folder, and chooses one by device, dtype and shape.

A backend is a module here with a `BACKEND`: adding one takes no change elsewhere.
"""

import importlib
import pkgutil
from functools import cache

import torch

import sparsify.kernels
from sparsify.errors import SparsifyError, suggest
from sparsify.kernels.spec import Backend


@cache
def backends() -> tuple[Backend, ...]:
    """Returns every backend of this installation, the preferred first."""
    found = []
    for info in pkgutil.iter_modules(sparsify.kernels.__path__):
        module = importlib.import_module(f"sparsify.kernels.{info.name}")
        backend = getattr(module, "BACKEND", None)
        if isinstance(backend, Backend):
            found.append(backend)
    return tuple(sorted(found, key=lambda backend: -backend.priority))


def select_backend(
    device: torch.device, dtype: torch.dtype, inputs: int, outputs: int, *, name: str | None = None
) -> Backend:
    """Returns the first backend that supports a linear [outputs, inputs] of this dtype on this device.

    With a name, returns that backend; raises SparsifyError where it is unknown or does not support the linear.
    """
    if name is None:
        return next(b for b in backends() if b.supports(device, dtype, inputs, outputs))
    names = [backend.name for backend in backends()]
    if name not in names:
        known = ", ".join(names)
        raise SparsifyError(f"unknown backend {name!r}: this installation has {known}.{suggest(name, names)}")
    backend = backends()[names.index(name)]
    if not backend.supports(device, dtype, inputs, outputs):
        raise SparsifyError(
            f"backend {name!r} does not support a {outputs}×{inputs} linear in {dtype} on {device}; "
            "leave the backend out to have one chosen"
        )
    return backend
