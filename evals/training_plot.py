"""A picture of a finetuning: its losses, and the share of zeros in each layer with λ, over the tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {"loss": "#1b7f79", "all": "#9a9fa6", "mean": "#1b7f79", "layer": "#b9d8d5", "lambda": "#c0392b"}
_LAYER = "sparsity/"


def save_training_plot(history: Sequence[Mapping[str, Any]], tokens_per_step: int, title: str, path: Path) -> None:
    """Draws transformers' log_history of a run; entries without a loss are left out."""
    # Not pyplot: it keeps state and looks for a display.
    from matplotlib.figure import Figure

    rows = [entry for entry in history if "lm_loss" in entry]
    millions = [entry["step"] * tokens_per_step / 1e6 for entry in rows]
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(millions, [entry["loss"] for entry in rows], color=_COLOURS["all"], label="with the L1 term")
    left.plot(millions, [entry["lm_loss"] for entry in rows], color=_COLOURS["loss"], label="language model")
    left.set_ylabel("training loss, nats a token")
    left.legend(frameon=False, fontsize=8)
    for name in sorted({key for entry in rows for key in entry if key.startswith(_LAYER)}):
        right.plot(millions, [100 * entry[name] for entry in rows], color=_COLOURS["layer"], linewidth=1)
    if any("sparsity" in entry for entry in rows):
        right.plot(
            millions, [100 * entry["sparsity"] for entry in rows], color=_COLOURS["mean"], label="mean of layers"
        )
    right.set_ylabel("zeros that enter down, %")
    factors = right.twinx()
    factors.plot(millions, [entry["lambda"] for entry in rows], color=_COLOURS["lambda"], linestyle="--", linewidth=1)
    factors.set_ylabel("λ (dashed)", color=_COLOURS["lambda"])
    factors.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("million tokens")
        axes.spines["top"].set_visible(False)
    left.spines["right"].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
