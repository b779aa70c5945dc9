"""`sparsify convert --method ppl-p`: the thresholds of PPL-p% sparsity, found for a rise of perplexity, as a model.

The same as `sparsify measure --out`, on the texts of a budget by quality: thresholds from the first three quarters of
the calibration text, perplexity on its last quarter.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from sparsify.cli.budgets import Met
from sparsify.cli.output import percent
from sparsify.cli.progress import Progress
from sparsify.cli.settings import ConvertSettings
from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsify.calibration import Calibration
    from sparsify.text import Windows

PPL_P = "ppl-p"
# Settings of methods that spend bytes.
_OTHERS = ("sparsity", "speedup", "allocation", "allocation_state", "rho", "score", "recipe", "rotation", "svd")


def check_ppl_p(settings: ConvertSettings) -> None:
    """Raises SparsifyError where the settings ask the method for anything but a rise of perplexity."""
    asked = [name for name in _OTHERS if getattr(settings, name) is not None]
    asked += [name for name in ("compensate", "rotate") if getattr(settings, name)]
    # Without a budget, a conversion's is a sparsity.
    if settings.max_ppl_increase is None:
        raise SparsifyError("method ppl-p drops what a rise of perplexity allows: give --max-ppl-increase, such as 1%")
    if asked:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise SparsifyError(f"method ppl-p takes --max-ppl-increase and no share of bytes: leave {flags} out")


def convert_ppl_p(
    settings: ConvertSettings,
    make: "Callable[[], PreTrainedModel]",
    calibration: "Calibration",
    held_out: "Windows",
    progress: Progress,
) -> "tuple[PreTrainedModel, Met]":
    """Returns the model whose weak MLP neurons are dropped, and what was found.

    Raises SparsifyError where the limit allows none to be dropped, or no MLP can be found.
    """
    import torch

    from sparsify.evals.ppl_p import apply_point, measure_ppl_p
    from sparsify.evals.quality_budget import check_increase

    model = make()
    increase = check_increase(settings.max_ppl_increase)
    # Nothing of these windows is scored: they are what thresholds are fitted on.
    fitted = replace(
        held_out,
        tokens=calibration.tokens,
        scored_from=torch.full((len(calibration.tokens),), calibration.tokens.shape[1]),
        token_bytes=torch.zeros_like(calibration.tokens),
        name=calibration.source,
    )
    measured = measure_ppl_p(model, held_out, p=[increase], cett_windows=fitted, progress=progress)
    point = measured.points[0]
    apply_point(model, point, scope=measured.scope, calibration=calibration)
    rise = point.perplexity / measured.dense.perplexity - 1.0
    said = (
        f"perplexity at most {increase:.3%} above dense: found {percent(1.0 - point.activation_ratio)} of MLP neurons "
        f"to drop, where it is {rise:.3%} above, on {measured.dense.tokens:,} tokens of {measured.dense.text}"
    )
    found = {"kind": PPL_P, "increase": rise, "max_increase": increase, "said": said} | measured.to_dict()
    return model, Met(said, found)
