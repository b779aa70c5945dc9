"""TEAL's public kernel, from a checkout of its code, beside ours: the same sites, thresholds and bytes.

Its product is in fp16, for one token; one that raises or is wrong is a problem of its side and leaves ours as they are.
Not covered: its whole model.
"""

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.evals.gpu_bench import Bench, described, site_call
from sparsify.evals.gpu_timing import TOLERANCES, Call, Side, Site

# Where the paper's speed is quoted; its tuner takes seconds for each.
TEAL_SPARSITIES = (0.4, 0.5, 0.6)
# TEAL adds up to hundreds of parts of a sum in fp16.
_TEAL_TOLERANCE = 3e-2

Teal = Callable[[Tensor, Tensor, float, int], Tensor]


def teal_speed(bench: Bench, site: Site, teal: Teal) -> dict[str, Any]:
    """Measures TEAL's kernel beside ours: fp16, one token, for a gated site both without act · up.

    TEAL's weights are merged, one launch a site, which is the best that it can do.
    """
    copies = bench.copies(replace(site, gated=False), torch.float16, 1)
    merged = [torch.cat([w.t() for w in weights], dim=1).t() for weights in copies.weights]
    sides: dict[str, Side] = {}
    about: dict[str, dict[str, Any]] = {}
    for sparsity in TEAL_SPARSITIES:
        tensors = copies.tensors(sparsity)
        expected, kept = copies.expected(tensors[0]), copies.kept(tensors)
        common = {"sparsity": sparsity, "kept": kept, "bytes": kept * site.nbytes(torch.float16)}
        for form in ("masked", "indexed"):
            name = f"{form} {sparsity:.0%}"
            call = site_call(bench, copies, tensors, indexed=form == "indexed")
            sides[name] = Side(call, expected, TOLERANCES[torch.float16])
            about[name] = {"form": form, **common}
        cuts = [float(linears[0].threshold) for linears in tensors]
        name = f"TEAL {sparsity:.0%}"
        sides[name] = Side(
            _teal_call(teal, copies.h, merged, cuts, round(100 * sparsity)), [torch.cat(expected, 1)], _TEAL_TOLERANCE
        )
        about[name] = {"form": "TEAL", **common}
    measured = bench.timed(sides, len(copies))
    return {"copies": len(copies)} | described(measured, about, {"over_teal": "TEAL {sparsity:.0%}"})


def load_teal(folder: Path) -> Teal:
    """Returns TEAL's product (x [1, 1, K], weight [N, K] channel-contiguous, threshold, bin) → [1, 1, N] of a checkout.

    https://github.com/FasterDecoding/TEAL, kernels/sparse_gemv.py. Its wrapper for torch.compile is left out: it needs
    a package that nothing else of it needs. Raises SparsifyError for a folder that does not hold it, and whatever its
    code raises.
    """
    file = folder / "kernels" / "sparse_gemv.py"
    spec = importlib.util.spec_from_file_location("teal_sparse_gemv", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise SparsifyError(f"--teal {folder}: there is no kernels/sparse_gemv.py; give a checkout of TEAL")
    module, wrapper = importlib.util.module_from_spec(spec), types.ModuleType("compile_wrapper")
    wrapper.__dict__["BaseKernel"] = object
    path, before = list(sys.path), sys.modules.get("compile_wrapper")
    sys.modules["compile_wrapper"] = wrapper
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
        del sys.modules["compile_wrapper"]
        if before is not None:
            sys.modules["compile_wrapper"] = before
    product: Teal = module.splitk_sparse_gemv
    return product


def _teal_call(teal: Teal, h: Sequence[Tensor], weights: Sequence[Tensor], cuts: Sequence[float], tag: int) -> Call:
    return lambda index: teal(h[index].view(1, 1, -1), weights[index], cuts[index], tag)
