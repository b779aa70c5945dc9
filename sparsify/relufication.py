"""ReLU-fication: another activation in the MLPs of a model, with zeros that need no weights (arXiv 2310.04564).

The activation is swapped in the modules and in the configuration, under the key that the model's family reads, so that
save_pretrained writes an ordinary Hugging Face checkpoint of the new function. Weights stay as they are: what the swap
costs is won back by reconstruction (sparsify.reconstruction) or by training. Not covered: experts, models whose MLPs
call an activation as a function.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from sparsify.errors import SparsifyError, suggest
from sparsify.mlp_targets import find_mlps
from sparsify.neuron_cut import Mlp
from sparsify.targets import find_targets

# What each activation is called in a configuration; all of them are transformers' own.
ACTIVATIONS = {"relu": "relu", "relu2": "relu2"}
_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def relufy(model: PreTrainedModel, activation: str = "relu", *, mlps: tuple[Mlp, ...] | None = None) -> tuple[Mlp, ...]:
    """Swaps the activation of every MLP in place and returns the MLPs; with `relu`, max(x, 0); `relu2`, max(x, 0)².

    mlps: those of check_relufiable, where the modules are swapped already and the configuration is not.
    Raises SparsifyError as check_relufiable does.
    """
    mlps = check_relufiable(model, activation) if mlps is None else mlps
    config: Any = model.config.get_text_config()
    for key in _named_keys(config):
        setattr(config, key, ACTIVATIONS[activation])
    for mlp in mlps:
        swap_activation(model, mlp, activation)
    return mlps


def swap_activation(model: PreTrainedModel, mlp: Mlp, activation: str) -> None:
    """Swaps one MLP's activation, and not what the configuration says."""
    model.set_submodule(mlp.activation, ACT2FN[ACTIVATIONS[activation]])


def check_relufiable(model: PreTrainedModel, activation: str) -> tuple[Mlp, ...]:
    """Returns the MLPs whose activation can be swapped; runs one short forward.

    Raises SparsifyError for an unknown activation, a model without MLPs that can be found, one whose activation has no
    ReLU counterpart (it has zeros already, or is not a smooth ReLU), or a configuration that does not name it.
    """
    if activation not in ACTIVATIONS:
        raise SparsifyError(
            f"unknown activation {activation!r}: allowed are {', '.join(ACTIVATIONS)}."
            f"{suggest(activation, ACTIVATIONS)}"
        )
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    mlps = find_mlps(model, find_targets(model, tokens), tokens)
    if not mlps:
        raise SparsifyError(
            f"no block of {type(model).__name__} has an MLP, down(act(gate x) · up x) or down(act(up x)), of linears "
            "that can be converted, so there is no activation to swap: use a method of channels, such as teal"
        )
    for mlp in mlps:
        _check_counterpart(mlp, model.get_submodule(mlp.activation))
    kinds = {type(model.get_submodule(mlp.activation)) for mlp in mlps}
    named = {type(ACT2FN[str(getattr(model.config.get_text_config(), key))]) for key in _named_keys(model.config)}
    if not kinds <= named:
        raise SparsifyError(
            f"the configuration of {type(model).__name__} does not say that its MLPs have "
            f"{', '.join(sorted(kind.__name__ for kind in kinds))} under {', '.join(_KEYS)}: a swapped activation "
            "could not be saved"
        )
    return mlps


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
