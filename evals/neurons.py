"""The neurons that a sparsity is measured on: which there are, and what they do in a forward.

scope mlp: the neurons of every MLP. Neuron i of the paper's eq. 2 is n_i = h_i·W_down[:, i], with h the input of the
down projection. scope linears: the input channels of every linear in the blocks, n_j = x_j·W[:, j]; ours.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.errors import SparsifyError, suggest
from sparsify.mlp_targets import find_mlps
from sparsify.targets import dense_weight, find_targets
from sparsify.text import Windows

Scope = Literal["mlp", "linears"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear whose input channels are neurons: name and module, ‖W[:, i]‖ [I] in fp32, and its activation.

    activation: the module whose output is s [..., I]; None where a channel's activation is the input itself.
    """

    name: str
    linear: nn.Module
    norms: Tensor
    activation: nn.Module | None

    @property
    def neurons(self) -> int:
        return self.norms.numel()


# Called with a layer, its inputs h and activations s, both [T, I], and which tokens are real, [T] bool or None for all.
# A mask [T, I] that it returns says which neurons are kept in this forward.
See = Callable[[Layer, Tensor, Tensor, Tensor | None], Tensor | None]


def layers_of(model: PreTrainedModel, scope: str, tokens: Tensor) -> list[Layer]:
    """Returns the layers of a dense model in module order, found by a forward on tokens [1, S].

    Raises SparsifyError for an unknown scope, and where there is nothing to measure.
    """
    if scope not in get_args(Scope):
        allowed = get_args(Scope)
        raise SparsifyError(f"unknown scope {scope!r}: allowed are {', '.join(allowed)}.{suggest(scope, allowed)}")
    targets = find_targets(model, tokens)
    activations: dict[str, nn.Module | None] = dict.fromkeys(targets.names)
    if scope == "mlp":
        mlps = find_mlps(model, targets, tokens)
        if not mlps:
            raise SparsifyError(
                f"{type(model).__name__} has no MLP that can be found in its blocks (an activation module between two "
                "linears that all tokens pass; experts are none): measure every linear with --scope linears"
            )
        activations = {mlp.down: model.get_submodule(mlp.activation) for mlp in mlps}
    layers = []
    for name, module in model.named_modules():
        if name in activations:
            norms = dense_weight(module).detach().double().norm(dim=0).float()
            layers.append(Layer(name, module, norms, activations[name]))
    return layers


@contextmanager
def watched(model: PreTrainedModel, layers: Sequence[Layer], windows: Windows, see: See) -> Iterator[None]:
    """Inside, `see` is called before every forward of the layers, while the model runs once over the windows in order.

    A batch is any number of windows. Where `see` returns a mask, the layer's other neurons are 0 in this forward.
    """
    rows = _Rows(windows)
    latest: dict[nn.Module, Tensor] = {}

    def hear(module: nn.Module, args: tuple[Any, ...], s: Tensor) -> None:
        latest[module] = s

    def hook(layer: Layer) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            h = args[0]
            flat = h.reshape(-1, h.shape[-1])
            s = flat if layer.activation is None else latest[layer.activation].reshape(flat.shape)
            keep = see(layer, flat, s, rows.real(len(flat), flat.device))
            return None if keep is None else (torch.where(keep.view(h.shape), h, 0.0), *args[1:])

        return before

    with ExitStack() as stack:
        # The one module that every family calls once a forward with the token ids.
        stack.callback(model.get_input_embeddings().register_forward_pre_hook(rows.next).remove)
        for activation in {id(layer.activation): layer.activation for layer in layers}.values():
            if activation is not None:
                stack.callback(activation.register_forward_hook(hear).remove)
        for layer in layers:
            stack.callback(layer.linear.register_forward_pre_hook(hook(layer)).remove)
        yield


class _Rows:
    """Which tokens of the batch that is running now are real."""

    def __init__(self, windows: Windows) -> None:
        self._real = real_tokens(windows)
        self._padded = not bool(self._real.all())
        self._start = self._end = 0

    def next(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._start, self._end = self._end, self._end + len(args[0])

    def real(self, tokens: int, device: torch.device) -> Tensor | None:
        """Returns the mask [T] of the batch, None where all of its tokens are real."""
        if not self._padded:
            return None
        mask = self._real[self._start : self._end].flatten()
        if len(mask) != tokens:
            raise SparsifyError(f"a layer ran on {tokens} tokens of a padded batch of {len(mask)}: use whole windows")
        return mask.to(device)


def real_tokens(windows: Windows) -> Tensor:
    """Returns which tokens are no padding, bool [N, S]: all of them in windows cut from a text."""
    real = getattr(windows, "real", None)
    return torch.ones_like(windows.tokens, dtype=torch.bool) if real is None else real
