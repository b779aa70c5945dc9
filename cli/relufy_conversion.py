"""`sparsify convert --method relufy`: another activation in a model's place, its MLPs fitted, then method relu.

With `relufy+teal` the linears that ReLU does not settle are those of the second method. With --plain the result is a
dense Hugging Face checkpoint, without sparse layers: with relu and relu2 an ordinary one, with fatrelu one that vLLM
knows, with the others one that needs sparsify.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.cli.output import percent
from sparsify.cli.progress import Progress
from sparsify.cli.settings import ConvertSettings
from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from sparsify.calibration import Calibration
    from sparsify.reconstruction import Reconstruction
    from sparsify.relufication import Relufication
    from sparsify.text import Windows

RELUFY = "relufy"
_FIT = {"reconstruct_inputs": "inputs", "reconstruct_weighting": "weighting", "reconstruct_zeros": "sparsity_weight"}
_OWN = ("activation", "zeros", "reconstruct", "reconstruct_state", *_FIT)
# What sparse layers can run: the others are 0 nowhere.
_SPARSE = ("relu", "relu2", "fatrelu", "shifted_relu", "drelu")


def is_relufy(settings: ConvertSettings) -> bool:
    return settings.method.partition("+")[0] == RELUFY


def settle_relufy(settings: ConvertSettings) -> ConvertSettings:
    """Returns the settings of the conversion after the swap, with method relu in the place of relufy.

    Raises SparsifyError for options of relufy with another method, and of the fit without one.
    """
    if not is_relufy(settings):
        asked = [name for name in _OWN if getattr(settings, name) is not None]
        asked += [name for name in ("plain", "after_norms") if getattr(settings, name)]
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
    how = relufication_of(settings)
    method = settings.method.replace(RELUFY, "relu", 1)
    own_cut = how.activation == "fatrelu"
    if settings.plain and (method != "relu" or (not own_cut and (settings.cut or settings.cett) is not None)):
        raise SparsifyError("--plain writes no sparse layers: leave --cut, --cett and the second method out")
    if not settings.plain and how.activation not in _SPARSE:
        raise SparsifyError(
            f"activation {how.activation} has no sparse layers, only {', '.join(_SPARSE)} have: give --plain for a "
            "dense checkpoint"
        )
    if own_cut:
        settings = replace(settings, cut=None, cett=None)
    return replace(settings, method=method)


def relufication_of(settings: ConvertSettings) -> "Relufication":
    """Returns what takes the activation's place; a cut of activation fatrelu is its own, others are method relu's."""
    from sparsify.relufication import Relufication

    activation = settings.activation or "relu"
    cuts = {"cut": settings.cut, "cett": settings.cett} if activation == "fatrelu" else {}
    return Relufication(activation, settings.after_norms, zeros=settings.zeros, **cuts)


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
    from sparsify.plain_checkpoint import check_plain
    from sparsify.reconstruction import reconstruct
    from sparsify.relufication import check_relufiable, relufy
    from sparsify.zeros import nonzero_shares

    relufication = relufication_of(settings)
    parts = check_relufiable(model, relufication)
    mlps = parts.mlps
    if settings.plain:
        check_plain(model, relufication, parts)
    before = type(model.get_submodule(mlps[0].activation)).__name__
    found: dict[str, Any] = {
        "relufication": asdict(relufication), "activation": relufication.hidden_act, "replaced": before,
        "mlps": len(mlps), "fitted": None,
    }  # fmt: skip
    if windows is not None:
        found["perplexity_before"] = perplexity(model, windows).perplexity
    how = reconstruction_of(settings)
    if how is None:
        relufy(model, relufication, calibration, progress=progress)
    else:
        state = None if settings.reconstruct_state is None else Path(settings.reconstruct_state)
        fitted = reconstruct(model, relufication, how, calibration, state=state, progress=progress)
        found["fitted"] = {"settings": asdict(how), "mlps": [asdict(one) for one in fitted]}
    if windows is not None:
        found["perplexity"] = perplexity(model, windows).perplexity
    shares = nonzero_shares(model, [mlp.down for mlp in mlps], calibration, progress)
    found["zeros"] = {name: 1.0 - share for name, share in shares.items()}
    found["mean_zeros"] = sum(found["zeros"].values()) / len(shares)
    found["numbers"] = {mlp.down: _numbers(model.get_submodule(mlp.activation)) for mlp in mlps}
    return found


def _numbers(activation: "nn.Module") -> dict[str, Any]:
    """Returns the numbers of a fitted activation by name."""
    found: dict[str, Any] = {name: buffer.tolist() for name, buffer in activation.named_buffers()}
    cut = getattr(activation, "cut", None)
    return found | ({} if cut is None else {"cut": cut})


def cut_of(model: "PreTrainedModel") -> float:
    """Puts ReLU in the place of FATReLU, in modules and configuration, and returns its cut, for method relu."""
    from torch import nn

    from sparsify.activations import FATRELU_CUT, FatReLU

    cuts = {name: module.cut for name, module in model.named_modules() if isinstance(module, FatReLU)}
    for name in cuts:
        model.set_submodule(name, nn.ReLU())
    config: Any = model.config.get_text_config()
    for key, value in list(vars(config).items()):
        if value == "fatrelu":
            setattr(config, key, "relu")
    delattr(config, FATRELU_CUT)
    return float(next(iter(cuts.values())) or 0.0)


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
        f"{percent(found['mean_zeros'])} of the inputs of down are 0 on the calibration text{measured}"
    )


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
