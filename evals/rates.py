"""How fast this machine is at what a conversion does: a few small operations, each timed a few times.

The best of the tries counts: others on the machine make it slower and never faster. Measured once in a process, not
kept anywhere.
"""

import hashlib
import time
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F

from sparsify.calibration import ScoreHistogram
from sparsify.svd_cost import Rates, svd_flops

_TRIES = 3
# Sides of the weight that products are timed with, of the matrices that are decomposed, and bytes that are hashed.
_OUTPUTS, _INPUTS = 2048, 1024
_SVD, _QR = 256, (2048, 128)
_HASHED = 8 << 20
# Values of an elementwise pass: more than a core's caches hold.
_VALUES = 2 << 20


@cache
def measure_rates(device: torch.device, dtype: torch.dtype, tokens: int) -> Rates:
    """Returns the rates on a device for weights of a dtype and windows of that many tokens; takes a second or two."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def timed(operation: Callable[[], object]) -> float:
        return _best(operation, device)

    flops = 2.0 * tokens * _OUTPUTS * _INPUTS
    rates: dict[torch.dtype, float] = {}
    for kind in (dtype, torch.float32, torch.float64):
        x, weight = random(tokens, _INPUTS, dtype=kind), random(_OUTPUTS, _INPUTS, dtype=kind)
        rates.setdefault(kind, flops / timed(partial(F.linear, x, weight)))
    square, tall = random(_SVD, _SVD, dtype=torch.float64), random(*_QR)
    values, scores = random(_VALUES, dtype=dtype), random(_VALUES // 4, dtype=dtype)
    data = bytes(_HASHED)
    return Rates(
        model=rates[dtype],
        single=rates[torch.float32],
        double=rates[torch.float64],
        svd=svd_flops(_SVD, _SVD) / timed(lambda: torch.linalg.svd(square, full_matrices=False)),
        qr=4.0 * _QR[0] * _QR[1] ** 2 / timed(lambda: torch.linalg.qr(tall)),
        values=values.numel() / timed(lambda: values * values),
        scores=scores.numel() / timed(lambda: ScoreHistogram().add(scores.float().abs())),
        hashed=_HASHED / timed(lambda: hashlib.sha256(data).digest()),
    )


def _best(operation: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of the fastest of some tries, after one that is not counted."""
    times = []
    with torch.inference_mode():
        for _ in range(_TRIES + 1):
            started = time.perf_counter()
            operation()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return max(min(times[1:]), 1e-7)
