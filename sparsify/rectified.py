"""Modules whose outputs pass a ReLU, as forward hooks: up of dReLU, and the norms of stage 2 of ReLU-fication.

A hook, because weights and module names must stay those of the family: config.json names the modules under `rectified`,
and whoever makes the model from it (sparsify.plugin, sparsify.models) puts the hooks on. Where nobody does, the
activations that go with them say so (sparsify.activations). Decode steps of our own leave such models to transformers.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.activations import NeedsRectified
from sparsify.errors import CheckpointError

KEY = "rectified"


def rectify(module: nn.Module) -> None:
    """Makes the module's output pass a ReLU; a second call does nothing."""
    if not is_rectified(module):
        module.register_forward_hook(_rectified)


def is_rectified(module: nn.Module) -> bool:
    return _rectified in module._forward_hooks.values()


def rectify_named(model: nn.Module, config: Any) -> None:
    """Rectifies the modules that the configuration names, and tells the activations that it is done.

    Raises CheckpointError for a name that is not a module's.
    """
    names = getattr(config.get_text_config(), KEY, None)
    if names is None:
        return
    modules = dict(model.named_modules())
    if not isinstance(names, list) or any(not isinstance(name, str) or name not in modules for name in names):
        raise CheckpointError(
            f"config.json has {KEY} {str(names)[:80]}, a list of modules of {type(model).__name__} is expected"
        )
    for name in names:
        rectify(modules[name])
    for module in modules.values():
        if isinstance(module, NeedsRectified):
            module.is_complete = True


def _rectified(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return F.relu(y)
