"""Rotations of a model's activations into their principal components, where few channels hold most of each token.

`eigenbasis` is LaRoSA's Q (arXiv 2507.01299): eigenvectors of XᵀX of calibration activations, the largest first.
`rotate` gives a whole model one Q without another weight: the residual stream is turned, h' = Qᵀh, and every linear
that reads or writes it is turned with it (computational invariance, SliceGPT, arXiv 2401.15024). Where we differ:
LaRoSA has a Q for each layer and a product Q_lᵀ Q_{l+1} on the residual stream, which a token pays for.
Not covered: LayerNorms, and decoders other than the Llama-like ones.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.calibration import Calibration, Progress, hooked, run_batches
from sparsify.errors import SparsifyError
from sparsify.linear import SparseLayer
from sparsify.llama_like import structure_problem

# LaRoSA's: a share of the mean of the diagonal of XᵀX, added to the diagonal.
_DAMPING = 0.01


def rotate(model: PreTrainedModel, calibration: Calibration, *, progress: Progress | None = None) -> PreTrainedModel:
    """Turns the residual stream of a dense model in place by one Q [D, D] and returns it: the same function, rotated.

    Q is the eigenbasis of Σ x̂ᵀx̂ over the inputs of all attentions and MLPs, x̂ normalised and not yet scaled by the
    norm's weight. Norm weights are folded into the linears behind them and set to 1; a head that is tied to the
    embedding gets a weight of its own, and the configuration says so. Each weight is computed in fp64 and rounded once.
    Raises SparsifyError for a converted model and for one that is not a Llama-like decoder.
    """
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        raise SparsifyError("this model is converted already: rotate the dense model, then convert it")
    if (reason := rotation_problem(model)) is not None:
        raise SparsifyError(
            f"this model cannot be rotated as a whole, {reason}: use larosa with rotation='layer', or convert without"
        )
    decoder: Any = model.model
    norms = {
        f"{index} {name}": getattr(block, name)
        for index, block in enumerate(decoder.layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    moments = second_moments(model, {"all": norms}, calibration, normalised=True, progress=progress)
    _turn(model, eigenbasis(moments["all"]))
    return model


def rotation_problem(model: PreTrainedModel) -> str | None:
    """Returns why `rotate` cannot turn the model, in a few words; None where it can."""
    return structure_problem(model)


def second_moments(
    model: PreTrainedModel,
    groups: Mapping[str, Mapping[str, nn.Module]],
    calibration: Calibration,
    *,
    normalised: bool = False,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Returns XᵀX [I, I] in fp64 of the inputs of each group's modules together, on the whole calibration text.

    normalised: of x / √(mean x² + ε), as an RMSNorm module makes it, in the place of x.
    Raises SparsifyError where it is not finite.
    """
    modules = {f"{group}\n{name}": module for group, named in groups.items() for name, module in named.items()}
    moments: dict[str, Tensor] = {}

    def see(key: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if normalised:
            epsilon: Any = modules[key].variance_epsilon
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        group, moment = key.partition("\n")[0], (x.T @ x).double()
        moments[group] = moments[group] + moment.to(moments[group].device) if group in moments else moment

    with hooked(modules, see):
        run_batches(model, calibration.tokens, "rotate", progress)
    for group, moment in moments.items():
        if not bool(moment.isfinite().all()):
            raise SparsifyError(
                f"the activations of {group} are not finite on the calibration text, so no rotation can be fitted: "
                "check the model in this dtype, or load it in another (--dtype)"
            )
    return moments


def eigenbasis(moment: Tensor) -> Tensor:
    """Returns Q [I, I] in fp64: orthonormal eigenvectors of XᵀX as columns, the largest eigenvalue's first."""
    damping = _DAMPING * moment.diagonal().mean()
    damped = moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    vectors: Tensor = torch.linalg.eigh(damped).eigenvectors
    return vectors.flip(-1)


@torch.no_grad()
def _turn(model: PreTrainedModel, q: Tensor) -> None:
    model_: Any = model
    decoder, head = model_.model, model_.lm_head
    _untie(model_)
    _set(decoder.embed_tokens.weight, decoder.embed_tokens.weight.double() @ q.to(decoder.embed_tokens.weight.device))
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        _turn_readers([attention.q_proj, attention.k_proj, attention.v_proj], block.input_layernorm, q)
        _turn_readers([mlp.gate_proj, mlp.up_proj], block.post_attention_layernorm, q)
        _turn_writer(attention.o_proj, q)
        _turn_writer(mlp.down_proj, q)
    _turn_readers([head], decoder.norm, q)


def _untie(model: Any) -> None:
    if model.lm_head.weight is model.model.embed_tokens.weight:
        weight = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _turn_readers(linears: list[nn.Linear], norm: Any, q: Tensor) -> None:
    """W ← W·diag(g)·Q, g ← 1."""
    for linear in linears:
        weight = linear.weight
        _set(weight, (weight.double() * norm.weight.double()) @ q.to(weight.device))
    norm.weight.data = torch.ones_like(norm.weight)


def _turn_writer(linear: nn.Linear, q: Tensor) -> None:
    """W ← Qᵀ·W, b ← Qᵀ·b."""
    _set(linear.weight, q.to(linear.weight.device).T @ linear.weight.double())
    if linear.bias is not None:
        _set(linear.bias, q.to(linear.bias.device).T @ linear.bias.double())


def _set(parameter: Tensor, value: Tensor) -> None:
    # A new tensor: what was mapped from a file is not written to, and what points to the old one notices.
    parameter.data = value.to(parameter.dtype).contiguous()
