"""A budget as a speed: the least sparse conversion that is predicted to decode so many times as fast as dense.

The prediction comes from the costs of this machine (`cost_table`). The converted model is then measured against every
dense side in turns (`speed`), and both numbers are told side by side: the prediction is not corrected by it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from sparsify.calibration import Calibration
from sparsify.errors import SparsifyError
from sparsify.evals.cost_table import CostTable, decoding_tokens, touched_shares
from sparsify.evals.interleaving import Progress, Spread
from sparsify.evals.speed import decode_speed

# Nothing sparser is looked for.
_MOST = 0.95
_STEPS = 1000


@dataclass(frozen=True)
class SpeedBudget:
    """What was asked for, predicted and measured: times as fast as the best dense side, best_dense of the measurement.

    predicted: of the converted model's own shares; p10 and p90 of `measured` are by round.
    """

    speedup: float
    sparsity: float
    predicted: float
    measured: Spread
    predicted_best_dense: str
    measured_best_dense: str
    fits_in_cache: bool | None
    waited_for_cpu: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_speedup(value: float) -> float:
    """Returns a speed-up. Raises SparsifyError where it is not a number above 1."""
    if isinstance(value, bool) or not 1.0 < value < float("inf"):
        raise SparsifyError(f"speedup is {value}: it must be a number above 1, times as fast as the best dense way")
    return float(value)


def sparsity_for(table: CostTable, speedup: float) -> float:
    """Returns the least sparsity that the table predicts the speed-up for.

    Raises SparsifyError with the largest that it predicts where there is none up to 95%.
    """
    check_speedup(speedup)
    grid = [_MOST * index / _STEPS for index in range(_STEPS + 1)]
    predicted = [table.predicted_speedup(sparsity) for sparsity in grid]
    for sparsity, found in zip(grid, predicted, strict=True):
        if found >= speedup:
            return sparsity
    largest = max(predicted)
    raise SparsifyError(
        f"a speedup of {speedup:g} cannot be had here: the largest that is predicted is {largest:.2f}, at sparsity "
        f"{grid[predicted.index(largest)]:.0%}, over {table.best_dense} with {table.dense_ms[table.best_dense]:.2f} "
        f"ms a token; {table.rest_ms:.2f} ms are spent outside of the linears; ask for less"
    )


def measured_budget(
    model: PreTrainedModel,
    rows: PreTrainedModel | None,
    calibration: Calibration,
    table: CostTable,
    *,
    speedup: float,
    rounds: int = 5,
    progress: Progress | None = None,
) -> SpeedBudget:
    """Measures a converted model against its dense sides, and puts the prediction beside it."""
    tokens, prompt_tokens = decoding_tokens(calibration)
    speed = decode_speed(model, tokens, prompt_tokens=prompt_tokens, rounds=rounds, rows=rows, progress=progress)
    sparse = speed.sides["sparse"]
    return SpeedBudget(
        speedup=speedup,
        sparsity=sparse.touched.nominal_sparsity,
        predicted=table.speedup_of(touched_shares(model)),
        measured=speed.ratios["sparse"][speed.best_dense],
        predicted_best_dense=table.best_dense,
        measured_best_dense=speed.best_dense,
        fits_in_cache=sparse.fits_in_cache,
        waited_for_cpu=speed.waited_for_cpu,
    )
