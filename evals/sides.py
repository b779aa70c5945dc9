"""The sides of a comparison of decode speed: every way to run one model's weights that this machine has room for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.evals import graph_decoding
from sparsify.evals.decoding import Decoded, Path, Side, decode
from sparsify.evals.graph_decoding import Graphs
from sparsify.evals.machine import available_memory
from sparsify.native_decode import disable, enable_where_possible, native_forward_of
from sparsify.runtime import sparse_layers

# Steps of the first, unmeasured run of each side, whose logits are compared.
CHECKED_STEPS = 4
# Of the weights' size, what a second copy takes while it is loaded; and what must stay free beside it.
_COPY_SHARE, _RESERVE = 1.15, 1 << 30

_ABOUT = {
    "sparse": "the converted model",
    "dense": "the same weights with sparsity switched off",
    "dense-rows": "row-major dense weights",
    "transformers": "transformers' default code on row-major dense weights",
    "compiled": "torch.compile of transformers' code on row-major dense weights, static cache",
}


def dense_copy(model: PreTrainedModel, make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel | None, str]:
    """Returns the model's dense weights once more, row-major, by `make`; or None and why there is no room for them."""
    needed = int(_COPY_SHARE * sum(p.numel() * p.element_size() for p in model.parameters())) + _RESERVE
    free = available_memory(model.device)
    if free is not None and free < needed:
        return None, (
            f"a second copy of the weights in row-major layout needs {needed / 1e9:.1f} GB of free memory, "
            f"{free / 1e9:.1f} GB are there"
        )
    return make(), ""


@contextmanager
def prepared(*models: PreTrainedModel | None) -> Iterator[None]:
    """Inside, the models are in evaluation mode and decode natively where they can; afterwards they are as before."""
    present = [model for model in models if model is not None]
    before = [(model, model.training, native_forward_of(model)) for model in present]
    try:
        for model in present:
            model.train(False)
            enable_where_possible(model)
        yield
    finally:
        for model, training, forward in before:
            model.train(training)
            if forward is None:
                disable(model)


def sides_of(
    model: PreTrainedModel,
    rows: PreTrainedModel | None = None,
    *,
    compiled: bool = False,
    thresholds: Mapping[float, Mapping[str, float]] | None = None,
) -> list[Side]:
    """Returns the sides of a prepared model, sparse ones first. A dense model is its own row-major copy.

    thresholds: by sparsity and layer; each sparsity is a side of its own, with one copy of the weights.
    """
    sides = []
    converted = bool(sparse_layers(model))
    path, graphs = _fast_path(model)
    fast = path != "transformers"
    own = Side("dense", _ABOUT["dense" if converted else "dense-rows"], model, path, graphs=graphs)
    if converted and not thresholds:
        sides.append(replace(own, name="sparse", about=_ABOUT["sparse"], run_dense=False))
    for sparsity, values in (thresholds or {}).items():
        name, about = f"sparse-{100 * sparsity:g}", f"{_ABOUT['sparse']} at {sparsity:.0%}"
        sides.append(replace(own, name=name, about=about, run_dense=False, thresholds=values, sparsity=sparsity))
    sides.append(own)
    rows = rows if converted else model
    if rows is None:
        return sides
    if fast and converted:
        path, graphs = _fast_path(rows)
        sides.append(Side("dense-rows", _ABOUT["dense-rows"], rows, path, graphs=graphs))
    if fast or converted:
        sides.append(Side("transformers", _ABOUT["transformers"], rows, "transformers"))
    if compiled:
        sides.append(Side("compiled", _ABOUT["compiled"], rows, "compiled", step=_compiled(rows)))
    return sides


def _fast_path(model: PreTrainedModel) -> tuple[Path, Graphs | None]:
    """Returns the fastest way of ours to run the model's steps."""
    if native_forward_of(model) is not None:
        return "native", None
    if graph_decoding.problem(model) is None:
        return "graph", Graphs(model)
    return "transformers", None


def first_runs(sides: Sequence[Side], tokens: Tensor, prompt_tokens: int) -> tuple[dict[str, Decoded], dict[str, str]]:
    """Runs each side once, unmeasured, for its threads, caches and compilation and for logits to compare.

    Returns what each decoded in CHECKED_STEPS steps, and for a side whose compilation failed why it did.
    """
    runs, failed = {}, {}
    for side in sides:
        try:
            runs[side.name] = first_run(side, tokens, prompt_tokens)
        # A compiler can fail in any way, and the report says how.
        except Exception as raised:
            if side.step is None:
                raise
            line = next(iter(str(raised).strip().splitlines()), "")
            failed[side.name] = f"torch.compile failed: {type(raised).__name__}: {line}"
    return runs, failed


def first_run(side: Side, tokens: Tensor, prompt_tokens: int) -> Decoded:
    """Decodes CHECKED_STEPS steps after the prompt."""
    return decode(side, tokens[:, : prompt_tokens + CHECKED_STEPS], prompt_tokens, capacity=tokens.shape[1])


def logits_difference(side: Side, runs: Mapping[str, Decoded], tokens: Tensor, prompt_tokens: int) -> float | None:
    """Returns the relative norm of a side's logits to those of transformers' path; None where it is that path.

    A dense side is held against torch's own products where that side is there, a sparse one against the same layers.
    """
    if side.path == "transformers":
        return None
    if side.run_dense and "transformers" in runs:
        expected = runs["transformers"].logits
    else:
        expected = first_run(replace(side, path="transformers", step=None), tokens, prompt_tokens).logits
    return float((runs[side.name].logits - expected).norm() / expected.norm())


def _compiled(model: PreTrainedModel) -> Callable[..., Any]:
    # The class's own forward: the native step may stand in the place of the model's. On a GPU with CUDA graphs.
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    forward = torch.compile(type(model).forward, mode=mode)
    return lambda **kwargs: forward(model, **kwargs)
