"""Finds the backends, one file each in this folder, and chooses one by device, dtype and shape.

A backend is a module here with a `BACKEND`: adding one takes no change elsewhere.
"""

import importlib
import logging
import pkgutil
from functools import cache

import torch

import sparsify.kernels
from sparsify.errors import SparsifyError, suggest
from sparsify.kernels.build import library_path
from sparsify.kernels.spec import Backend


@cache
def backends() -> tuple[Backend, ...]:
    """Returns every backend of this installation, the preferred first."""
    found = []
    for info in pkgutil.iter_modules(sparsify.kernels.__path__):
        # Its file ends as an extension module's, and is none.
        if info.name == library_path().stem:
            continue
        module = importlib.import_module(f"sparsify.kernels.{info.name}")
        backend = getattr(module, "BACKEND", None)
        if isinstance(backend, Backend):
            found.append(backend)
    return tuple(sorted(found, key=lambda backend: -backend.priority))


def preferred_backend(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> Backend:
    """Returns the first backend that supports a linear [outputs, inputs] of this dtype on this device."""
    return next(b for b in backends() if b.supports(device, dtype, inputs, outputs))


def select_backend(
    device: torch.device, dtype: torch.dtype, inputs: int, outputs: int, *, name: str | None = None
) -> Backend:
    """Returns the backend for a linear, the preferred one without a name; what a better one lacks here is logged once.

    With a name, returns that backend; raises SparsifyError where it is unknown or does not support the linear.
    """
    if name is None:
        chosen = preferred_backend(device, dtype, inputs, outputs)
        for better in backends()[: backends().index(chosen)]:
            if better.missing is not None and (line := better.missing(device, dtype)) is not None:
                _warn_once(line)
        return chosen
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


@cache
def _warn_once(line: str) -> None:
    logging.getLogger("sparsify").warning(line)
