"""How much the dense model's distribution depends on each output of an MLP: weights for fitting them.

H = |∇L(y + δ) − ∇L(y − δ)| / 2δ for the outputs y of one MLP, the mean over tokens, where L is the KL divergence from
the dense distribution at temperature 20: the average perturbation Hessian of APHQ-ViT (arXiv 2504.02508, section 3.2).
We differ in δ: the paper's 1e-6 is below what fp32 resolves in a language model's outputs, ours is 1% of their root
mean square.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.calibration import Calibration
from sparsify.neuron_cut import Mlp
from sparsify.trial import evaluating

_TEMPERATURE = 20.0
_STEP = 0.01
_WINDOWS = 8


def output_weights(model: PreTrainedModel, mlps: Sequence[Mlp], calibration: Calibration) -> dict[str, Tensor]:
    """Returns a weight for every output [O] of each MLP's down, fp32, of mean 1, from some calibration windows."""
    step = max(len(calibration.tokens) // _WINDOWS, 1)
    windows = calibration.tokens[::step][:_WINDOWS].to(model.device)
    sums: dict[str, Tensor] = {}
    with evaluating(model):
        for window in windows:
            with torch.no_grad():
                dense = _log_probabilities(model, window[None])
            for mlp in mlps:
                above, below = (_gradient(model, mlp.down, window[None], dense, sign * _STEP) for sign in (1.0, -1.0))
                mean = (above - below).abs().mean(dim=0)
                sums[mlp.down] = sums[mlp.down] + mean if mlp.down in sums else mean
    tiny = torch.finfo(torch.float32).tiny
    return {name: total / total.mean().clamp_min(tiny) for name, total in sums.items()}


def _gradient(model: PreTrainedModel, down: str, tokens: Tensor, dense: Tensor, step: float) -> Tensor:
    """Returns the gradient [T, O] of the divergence at the MLP's outputs, moved by step times their size."""
    moved: list[Tensor] = []

    def move(module: object, args: object, y: Tensor) -> Tensor:
        moved.append((y + step * y.float().square().mean().sqrt().to(y.dtype)).detach().requires_grad_())
        return moved[0]

    handle = model.get_submodule(down).register_forward_hook(move)
    try:
        with torch.enable_grad():
            divergence = F.kl_div(_log_probabilities(model, tokens), dense, log_target=True, reduction="sum")
            (gradient,) = torch.autograd.grad(divergence, moved)
    finally:
        handle.remove()
    return gradient.detach().flatten(0, -2).float()


def _log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return F.log_softmax(logits.float() / _TEMPERATURE, dim=-1)
