"""`sparsify convert --method relufy`: ReLU in the place of a model's activation, its MLPs fitted, then method relu.

With `relufy+teal` the linears that ReLU does not settle are those of the second method. With --plain the result is an
ordinary Hugging Face checkpoint of a ReLU model, without sparse layers.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.cli.output import percent
from sparsify.cli.progress import Progress
from sparsify.cli.settings import ConvertSettings
from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsify.calibration import Calibration
    from sparsify.reconstruction import Reconstruction
    from sparsify.text import Windows

RELUFY = "relufy"
_FIT = {"reconstruct_inputs": "inputs", "reconstruct_weighting": "weighting", "reconstruct_zeros": "sparsity_weight"}
_OWN = ("activation", "reconstruct", "reconstruct_state", *_FIT)


def is_relufy(settings: ConvertSettings) -> bool:
    return settings.method.partition("+")[0] == RELUFY


def settle_relufy(settings: ConvertSettings) -> ConvertSettings:
    """Returns the settings of the conversion after the swap, with method relu in the place of relufy.

    Raises SparsifyError for options of relufy with another method, and of the fit without one.
    """
    if not is_relufy(settings):
        asked = [name for name in _OWN if getattr(settings, name) is not None] + ["plain"] * settings.plain
        if asked:
            raise SparsifyError(
                f"{_flags(asked)} is for method relufy, and the method is {settings.method}: leave it out"
            )
        return settings
    fit = [name for name in (*_FIT, "reconstruct_state") if getattr(settings, name) is not None]
    if not settings.reconstruct and fit:
        raise SparsifyError(f"{_flags(fit)} is for --reconstruct, the number of passes: give it, such as 10")
    if settings.reconstruct is not None and settings.reconstruct < 0:
        raise SparsifyError(f"--reconstruct is {settings.reconstruct}: it must be at least 0")
    for name in ("max_ppl_increase", "speedup"):
        if getattr(settings, name) is not None:
            raise SparsifyError(
                f"{_flags([name])} looks for a share of bytes, and method relufy's zeros are the model's own: relufy "
                "with --plain first, then convert the result with this budget"
            )
    reconstruction_of(settings)
    method = settings.method.replace(RELUFY, "relu", 1)
    if settings.plain and (method != "relu" or settings.cut is not None):
        raise SparsifyError("--plain writes no sparse layers: leave --cut and the second method out")
    if settings.activation not in (None, "relu") and not settings.plain:
        raise SparsifyError(
            f"activation {settings.activation} has no sparse layers, only relu has: give --plain for a dense checkpoint"
        )
    return replace(settings, method=method)


def reconstruction_of(settings: ConvertSettings) -> "Reconstruction | None":
    """Returns how the MLPs are fitted, None where the swap is all."""
    from sparsify.reconstruction import Reconstruction

    given: dict[str, Any] = {
        field: value for name, field in _FIT.items() if (value := getattr(settings, name)) is not None
    }
    return Reconstruction(epochs=settings.reconstruct, seed=settings.seed, **given) if settings.reconstruct else None


def relufy_model(
    model: "PreTrainedModel",
    settings: ConvertSettings,
    calibration: "Calibration",
    windows: "Windows | None",
    progress: Progress,
) -> dict[str, Any]:
    """Swaps and fits in place; returns what was done, with both perplexities where there are windows."""
    from sparsify.evals.perplexity import perplexity
    from sparsify.reconstruction import reconstruct
    from sparsify.relu_conversion import active_shares
    from sparsify.relufication import check_relufiable, relufy

    activation = settings.activation or "relu"
    mlps = check_relufiable(model, activation)
    before = type(model.get_submodule(mlps[0].activation)).__name__
    found: dict[str, Any] = {"activation": activation, "replaced": before, "mlps": len(mlps), "fitted": None}
    if windows is not None:
        found["perplexity_before"] = perplexity(model, windows).perplexity
    how = reconstruction_of(settings)
    if how is None:
        relufy(model, activation)
    else:
        state = None if settings.reconstruct_state is None else Path(settings.reconstruct_state)
        fitted = reconstruct(model, activation, how, calibration, state=state, progress=progress)
        found["fitted"] = {"settings": asdict(how), "mlps": [asdict(one) for one in fitted]}
    if windows is not None:
        found["perplexity"] = perplexity(model, windows).perplexity
    shares = active_shares(model, mlps, 0.0, calibration, progress)
    found["zeros"] = {name: 1.0 - share for name, share in shares.items()}
    found["mean_zeros"] = sum(found["zeros"].values()) / len(shares)
    return found


def said_of(found: dict[str, Any]) -> str:
    """Returns what was done in one sentence, without its full stop."""
    fitted = found["fitted"]
    how = "weights as they were"
    if fitted is not None:
        settings = fitted["settings"]
        error = sum(one["error"] for one in fitted["mlps"]) / len(fitted["mlps"])
        how = (
            f"each MLP fitted in {settings['epochs']} passes on {settings['inputs']} inputs, {settings['weighting']} "
            f"error, {percent(error, 2)} left"
        )
    measured = ""
    if "perplexity" in found:
        measured = f"; perplexity {found['perplexity']:.3f}, {found['perplexity_before']:.3f} before"
    return (
        f"{found['activation']} in the place of {found['replaced']} in {found['mlps']} MLPs, {how}: "
        f"{percent(found['mean_zeros'])} of activations are 0 on the calibration text{measured}"
    )


def save_plain(
    model: "PreTrainedModel", out: Path, tokenizer: "PreTrainedTokenizerBase", source: str, said: str
) -> None:
    """Writes an ordinary Hugging Face checkpoint of the ReLU model. Raises as sparsify.save does."""
    from sparsify.models import quiet
    from sparsify.new_folder import new_folder

    card = f"""---
base_model: {source}
library_name: transformers
---

# {out.name}

{source} with {said}.

An ordinary checkpoint: nothing but transformers is needed to load it. `sparsify convert {out.name} --method relu` makes
its zeros save weights; `sparsify inspect` and `sparsify measure` say how many there are.
"""
    with new_folder(out) as folder:
        with quiet():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
