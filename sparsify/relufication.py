"""ReLU-fication: another activation in the MLPs of a model, with zeros that need no weights (arXiv 2310.04564).

The activation is swapped in the modules and in the configuration, under the key that the model's family reads, so that
save_pretrained writes a Hugging Face checkpoint of the new function. Weights stay as they are: what the swap costs is
won back by reconstruction (sparsify.reconstruction) or by training. Stage 2 puts a ReLU behind the norms, too. Not
covered: experts, models whose MLPs call an activation as a function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from sparsify import activation_fit
from sparsify.activations import (
    AFTER_NORMS,
    AFTER_NORMS_KINDS,
    FATRELU_CUT,
    KINDS,
    FatReLU,
    NeedsRectified,
    ShiftedReLU,
    register,
)
from sparsify.calibration import Calibration, Progress
from sparsify.errors import SparsifyError, suggest
from sparsify.mlp_targets import find_mlps
from sparsify.neuron_cut import Mlp
from sparsify.norm_targets import Norm, find_norms
from sparsify.rectified import KEY, rectify, rectify_named
from sparsify.targets import find_targets

ACTIVATIONS = tuple(KINDS)
DEFAULT_CETT = 0.2
_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_FITTED = ("shifted_relu", "fatrelu", "polyrelu", "polynorm", "crrelu")


@dataclass(frozen=True)
class Relufication:
    """What is put in the place of a model's activation, and how its numbers are found.

    activation: one of ACTIVATIONS. after_norms: a ReLU behind the norms, too (stage 2). cut: FATReLU's, or None for
    the largest whose CETT stays below `cett` (sparsify.relu_cuts). zeros: the share of zeros that a shift leaves on
    the dense model's inputs, None for the shift of least error. Raises SparsifyError for what is not one of these, or
    not that activation's.
    """

    activation: str = "relu"
    after_norms: bool = False
    cut: float | None = None
    cett: float | None = None
    zeros: float | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise SparsifyError(
                f"unknown activation {self.activation!r}: allowed are {', '.join(ACTIVATIONS)}."
                f"{suggest(self.activation, ACTIVATIONS)}"
            )
        if self.after_norms and self.hidden_act not in AFTER_NORMS_KINDS:
            allowed = ", ".join(name.removesuffix(AFTER_NORMS) for name in AFTER_NORMS_KINDS)
            raise SparsifyError(f"ReLU after the norms goes with the activations {allowed}, not with {self.activation}")
        for name, owner in (("cut", "fatrelu"), ("cett", "fatrelu"), ("zeros", "shifted_relu")):
            if getattr(self, name) is not None and self.activation != owner:
                raise SparsifyError(f"{name} is for activation {owner}, not for {self.activation}: leave it out")
        if self.cut is not None and not 0.0 <= self.cut < float("inf"):
            raise SparsifyError(f"the cut of a ReLU must be a finite number of at least 0, not {self.cut}")
        if self.cut is not None and self.cett is not None:
            raise SparsifyError("cut and cett both say where FATReLU cuts: give one of them")
        for name in ("cett", "zeros"):
            if (value := getattr(self, name)) is not None and not 0.0 <= value < 1.0:
                raise SparsifyError(f"{name} is {value}, it must be in [0, 1)")

    @property
    def hidden_act(self) -> str:
        """What the configuration calls it."""
        return self.activation + (AFTER_NORMS if self.after_norms else "")

    @property
    def needs_text(self) -> bool:
        """Whether its numbers are fitted on calibration text."""
        return self.activation in _FITTED and self.cut is None


@dataclass(frozen=True)
class Parts:
    """What of a model is swapped: its MLPs, and with stage 2 its norms, both in call order."""

    mlps: tuple[Mlp, ...]
    norms: tuple[Norm, ...] = ()

    def norm_of(self, mlp: Mlp) -> Norm | None:
        """Returns the norm before an MLP, where it is rectified."""
        return next((norm for norm in self.norms if mlp.up in norm.linears), None)

    def norms_before(self, mlp: Mlp) -> tuple[Norm, ...]:
        """Returns the norms that a forward comes to before the MLP's own."""
        own = self.norm_of(mlp)
        return self.norms if own is None else self.norms[: self.norms.index(own)]


class Swap:
    """A swap of one model, MLP by MLP; what the configuration says changes last, in `finish`."""

    def __init__(
        self, model: PreTrainedModel, how: Relufication, parts: Parts, modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.model, self.how, self.parts = model, how, parts
        self._modules = modules or {}
        self._rectified: list[str] = []

    def apply(self, mlp: Mlp) -> None:
        """Swaps one MLP's activation, rectifies its norm, and up where that is part of the activation."""
        register()
        found = self._modules.get(mlp.down)
        self.model.set_submodule(mlp.activation, ACT2FN[self.how.hidden_act] if found is None else found)
        activation = self.model.get_submodule(mlp.activation).to(self.model.device, self.model.dtype)
        if isinstance(activation, NeedsRectified):
            activation.is_complete = True
        if self.how.activation == "drelu":
            self._rectify(mlp.up)
        norm = self.parts.norm_of(mlp)
        if norm is not None:
            self._rectify(norm.name)

    def rectify_before(self, mlp: Mlp) -> None:
        """Rectifies the norms that come before the MLP's own."""
        for norm in self.parts.norms_before(mlp):
            self._rectify(norm.name)

    def finish(self) -> None:
        """Rectifies the norms that are left, and writes what was done into the configuration."""
        for norm in self.parts.norms:
            self._rectify(norm.name)
        config: Any = self.model.config.get_text_config()
        for key in _named_keys(config):
            setattr(config, key, self.how.hidden_act)
        if self.how.activation == "fatrelu":
            activation = self.model.get_submodule(self.parts.mlps[0].activation)
            assert isinstance(activation, FatReLU)
            setattr(config, FATRELU_CUT, activation.cut)
        if self._rectified:
            order = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
            setattr(config, KEY, sorted(self._rectified, key=order.__getitem__))
            rectify_named(self.model, config)

    def _rectify(self, name: str) -> None:
        if name not in self._rectified:
            self._rectified.append(name)
            rectify(self.model.get_submodule(name))


def relufy(
    model: PreTrainedModel,
    how: Relufication | str = "relu",
    calibration: Calibration | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[Mlp, ...]:
    """Swaps the activation of every MLP in place and returns the MLPs. Raises SparsifyError as prepare_swap does."""
    swap = prepare_swap(model, how, calibration, progress=progress)
    for mlp in swap.parts.mlps:
        swap.apply(mlp)
    swap.finish()
    return swap.parts.mlps


def relufy_unfitted(model: PreTrainedModel, how: Relufication | str = "relu") -> tuple[Mlp, ...]:
    """Swaps as relufy, with numbers as they are before a fit, for models without weights; raises as it does."""
    how = Relufication(how) if isinstance(how, str) else how
    parts = check_relufiable(model, how)
    modules = activation_fit.fat_relus(parts.mlps, how.cut or 0.0) if how.activation == "fatrelu" else None
    swap = Swap(model, how, parts, modules)
    for mlp in parts.mlps:
        swap.apply(mlp)
    swap.finish()
    return parts.mlps


@torch.no_grad()
def prepare_swap(
    model: PreTrainedModel,
    how: Relufication | str,
    calibration: Calibration | None = None,
    *,
    progress: Progress | None = None,
) -> Swap:
    """Checks the model and fits the activation's numbers on the dense model; nothing is swapped yet.

    Raises SparsifyError as check_relufiable does, and where an activation with numbers to fit gets no calibration.
    """
    how = Relufication(how) if isinstance(how, str) else how
    parts = check_relufiable(model, how)
    mlps = parts.mlps
    if how.activation == "fatrelu" and how.cut is not None:
        return Swap(model, how, parts, activation_fit.fat_relus(mlps, how.cut))
    if not how.needs_text:
        return Swap(model, how, parts)
    if calibration is None:
        raise SparsifyError(f"the numbers of {how.activation} are fitted on text: give a calibration")
    if how.activation == "fatrelu":
        cett = DEFAULT_CETT if how.cett is None else how.cett
        cut = activation_fit.fit_cut(model, mlps, calibration, cett=cett, progress=progress)
        return Swap(model, how, parts, activation_fit.fat_relus(mlps, cut))
    kind: Any = (KINDS | AFTER_NORMS_KINDS)[how.hidden_act]
    if issubclass(kind, ShiftedReLU):
        made = activation_fit.fit_shifts(model, mlps, calibration, kind, zeros=how.zeros, progress=progress)
    else:
        made = activation_fit.fit_coefficients(model, mlps, calibration, kind, progress=progress)
    return Swap(model, how, parts, made)


def check_relufiable(model: PreTrainedModel, how: Relufication | str) -> Parts:
    """Returns what of the model can be swapped; runs one short forward, or two.

    Raises SparsifyError for a model without MLPs that can be found, one whose activation has no ReLU counterpart (it
    has zeros already, or is not a smooth ReLU), a configuration that does not name it, dReLU without a separate gate
    and up, and stage 2 without norms.
    """
    how = Relufication(how) if isinstance(how, str) else how
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    targets = find_targets(model, tokens)
    mlps = find_mlps(model, targets, tokens)
    if not mlps:
        raise SparsifyError(
            f"no block of {type(model).__name__} has an MLP, down(act(gate x) · up x) or down(act(up x)), of linears "
            "that can be converted, so there is no activation to swap: use a method of channels, such as teal"
        )
    for mlp in mlps:
        _check_counterpart(mlp, model.get_submodule(mlp.activation))
        if how.activation == "drelu" and (mlp.gate is None or mlp.fused):
            has = "no gate" if mlp.gate is None else "gate and up in one linear"
            raise SparsifyError(f"dReLU is relu(gate x) · relu(up x), and the MLP of {mlp.down} has {has}: use relu")
    kinds = {type(model.get_submodule(mlp.activation)) for mlp in mlps}
    named = {type(ACT2FN[str(getattr(model.config.get_text_config(), key))]) for key in _named_keys(model.config)}
    if not kinds <= named:
        raise SparsifyError(
            f"the configuration of {type(model).__name__} does not say that its MLPs have "
            f"{', '.join(sorted(kind.__name__ for kind in kinds))} under {', '.join(_KEYS)}: a swapped activation "
            "could not be saved"
        )
    norms = find_norms(model, targets, tokens) if how.after_norms else ()
    if how.after_norms and not norms:
        raise SparsifyError(
            f"no linear of {type(model).__name__} reads what a norm wrote, so there is nothing that ReLU after the "
            "norms could make sparse: leave it out"
        )
    return Parts(mlps, norms)


def _check_counterpart(mlp: Mlp, activation: nn.Module) -> None:
    """Refuses activations that are not a smooth ReLU: x for large x, 0 for small, and somewhere between them."""
    kind = type(activation).__name__
    with torch.inference_mode():
        x = torch.tensor([-100.0, -0.5, 0.5, 100.0])
        y: Tensor = activation(x)
    if bool((y[:2] == 0).all()):
        raise SparsifyError(
            f"{mlp.activation} is {kind}, which has zeros already: method relu skips those of ReLU, without a swap"
        )
    if abs(float(y[0])) > 0.01 or abs(float(y[3]) - 100.0) > 1.0:
        raise SparsifyError(
            f"{mlp.activation} is {kind}, which has no ReLU counterpart: it is {float(y[0]):.3g} at -100 and "
            f"{float(y[3]):.3g} at 100, a smooth ReLU such as SiLU and GELU is 0 and 100; use a method of channels, "
            "such as teal"
        )


def _named_keys(config: Any) -> list[str]:
    """Returns the keys of the configuration that name an activation: Gemma has two, of which one may be empty."""
    text = config.get_text_config()
    return [key for key in _KEYS if isinstance(name := getattr(text, key, None), str) and name in ACT2FN]
