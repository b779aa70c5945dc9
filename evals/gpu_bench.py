"""What the measurements of the GPU kernels share: the bench that they are timed on, our call, rows of the document.

Not covered: what is measured (`gpu_kernel_speed`, `teal_kernel`), how it is timed (`gpu_timing`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.evals.gpu_timing import (
    ACTIVATION,
    Call,
    DeviceCopy,
    GraphTimer,
    Side,
    Site,
    SiteCopies,
    Timed,
    Timer,
    copies_on,
    timed,
)
from sparsify.evals.interleaving import Spread, medians, ratio
from sparsify.evals.machine import cache_of
from sparsify.kernels.gpu.tiles import Table, table_of
from sparsify.kernels.spec import SparseTensors

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.9)
ROUNDS = 15


@dataclass(frozen=True)
class Bench:
    """What the measurements of a run share. cache: bytes of the device's L2; table: the tiles that are used."""

    device: torch.device
    timer: Timer
    copy: DeviceCopy
    cache: int
    table: Table
    rounds: int = ROUNDS
    sparsities: Sequence[float] = SPARSITIES

    @classmethod
    def on(cls, device: torch.device, *, rounds: int = ROUNDS, sparsities: Sequence[float] = SPARSITIES) -> "Bench":
        """Returns one for a GPU. Raises UnavailableError where nothing can be timed."""
        timer, cache = GraphTimer(device), cache_of(device) or 0
        return cls(device, timer, DeviceCopy(device, cache=cache), cache, table_of(device), rounds, sparsities)

    def copies(self, site: Site, dtype: torch.dtype, tokens: int, recorded: Tensor | None = None) -> SiteCopies:
        """Returns the site as often as the lowest density needs."""
        number = copies_on(self.device, site.nbytes(dtype), 1.0 - max(self.sparsities), cache=self.cache)
        return SiteCopies(site, dtype, tokens, self.device, number, recorded=recorded)

    def timed(self, sides: Mapping[str, Side], copies: int) -> Timed:
        """Checks and measures the sides."""
        return timed(sides, copies, self.timer, self.copy, self.rounds)

    @property
    def scratch(self) -> Any:
        """The device's work memory."""
        from sparsify.kernels.gpu.scratch import scratch_of

        return scratch_of(self.device)


def site_call(
    bench: Bench, copies: SiteCopies, tensors: Sequence[Sequence[SparseTensors]], *, indexed: bool | None
) -> Call:
    """Returns our product of one site; indexed None: in the form that the table chooses."""
    from sparsify.kernels.gpu.site import run_site

    scratch = bench.scratch
    return lambda index: run_site(
        copies.x[index], tensors[index], scratch=scratch, table=bench.table, up=copies.up[index],
        activation=ACTIVATION, indexed=indexed,
    )  # fmt: skip


def described(measured: Timed, about: Mapping[str, dict[str, Any]], over: Mapping[str, str]) -> dict[str, Any]:
    """Returns what is known of every side. over: ratios by name, to the sides of these names (with a side's own values
    filled in), None where such a side has no times.
    """
    sides = []
    for name, known in about.items():
        if name in measured.problems:
            sides.append(known | {"problem": measured.problems[name]})
            continue
        rounds = measured.seconds[name]
        ms = milliseconds(rounds)
        shares = [known["bytes"] / s / 1e9 / gb for s, gb in zip(medians(rounds), measured.copy, strict=True)]
        others = {label: measured.seconds.get(other.format(**known)) for label, other in over.items()}
        ratios = {label: None if other is None else asdict(ratio(other, rounds)) for label, other in others.items()}
        speed = {"ms": asdict(ms), "gb_per_second": known["bytes"] / ms.median / 1e6}
        sides.append(known | speed | {"share_of_copy": asdict(Spread.of(shares))} | ratios)
    return {"copy_gb_per_second": asdict(Spread.of(measured.copy)), "sides": sides}


def milliseconds(rounds: Sequence[Sequence[float]]) -> Spread:
    """Returns the spread of all values of all rounds, in ms."""
    return Spread.of([1e3 * seconds for values in rounds for seconds in values])
