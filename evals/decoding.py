"""One side of a comparison of decoding: a model and the way its steps run, timed step by step.

Every side is fed the same tokens: the text's own, not its own choices, so that all sides do the same work and realised
sparsity is that of the very steps that were timed. The choice of a next token (argmax over the head) is made and timed
all the same. Not covered: prefill speed, sampling, energy.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sparsify.calibration import hooked
from sparsify.evals.graph_decoding import Graphs
from sparsify.evals.realised import RealisedDensity
from sparsify.evals.shapes import set_thresholds
from sparsify.evals.stream import wait
from sparsify.native_decode import native_forward_of, transformers_path
from sparsify.runtime import dense, sparse_layers

# Steps after the prompt that are not measured: they set up threads, buffers and caches.
WARM_UP_STEPS = 4
mark_step: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
Path = Literal["native", "graph", "transformers", "compiled"]


@dataclass(frozen=True)
class Side:
    """A model and how its steps run.

    path: the native step, CUDA graphs of ours, transformers' own code, or that code compiled; graphs: the graphs of a
    side that has them; run_dense: sparsity is switched off;
    step: what is called for a step of a compiled side; thresholds: set before it runs, by layer; sparsity: nominal;
    logits_difference: relative norm to the same weights on transformers' path, once it is known.
    """

    name: str
    about: str
    model: PreTrainedModel
    path: Path
    run_dense: bool = True
    step: Callable[..., Any] | None = None
    graphs: Graphs | None = None
    thresholds: Mapping[str, float] | None = None
    sparsity: float | None = None
    logits_difference: float | None = None


@dataclass(frozen=True)
class Decoded:
    """Seconds of each step, the last step's logits [B, V], and how many steps the native code did."""

    seconds: list[float]
    logits: Tensor
    native_steps: int


@dataclass(frozen=True)
class Counted:
    """Shares of channels kept, by layer: of a token, and of the union of a step's tokens, which a kernel reads."""

    token: dict[str, float]
    step: dict[str, float]


def decode(side: Side, tokens: Tensor, prompt_tokens: int, *, capacity: int | None = None) -> Decoded:
    """Runs the first `prompt_tokens` of tokens [B, S] as a prompt and times a step for each token after them.

    capacity: tokens that a compiled side's cache is made for, S where None; another one is compiled anew.
    """
    if side.graphs is not None and side.path == "graph":
        with running(side):
            return Decoded(*_by_graphs(side.graphs, side, tokens, prompt_tokens), 0)
    native = native_forward_of(side.model)
    before = native.steps if native is not None else 0
    seconds: list[float] = []
    with running(side):
        cache, steps = _prefilled(side, tokens, prompt_tokens, capacity or tokens.shape[1])
        step = side.step or side.model
        for token in steps:
            wait(side.model.device)
            started = time.perf_counter()
            if side.step is not None:
                mark_step()
            logits = step(input_ids=token, past_key_values=cache, use_cache=True).logits
            logits[:, -1:].argmax(-1)
            wait(side.model.device)
            seconds.append(time.perf_counter() - started)
    return Decoded(seconds, logits[:, -1].float(), native.steps - before if native is not None else 0)


def count(side: Side, tokens: Tensor, prompt_tokens: int) -> Counted:
    """Returns what a sparse side keeps in the steps after the prompt; hooks make them run transformers' code."""
    side = replace(side, path="transformers")
    layers = sparse_layers(side.model)
    united = dict.fromkeys(layers, 0.0)

    def see(name: str, x: Tensor) -> None:
        united[name] += float(layers[name].keep(x).flatten(0, -2).any(0).float().mean())

    with running(side):
        cache, steps = _prefilled(side, tokens, prompt_tokens, tokens.shape[1])
        with RealisedDensity(side.model) as realised, hooked(dict(layers), see):
            for token in steps:
                side.model(input_ids=token, past_key_values=cache, use_cache=True)
    densities = realised.densities()
    return Counted(densities, {name: united[name] / len(steps) for name in densities})


@contextmanager
def running(side: Side) -> Iterator[None]:
    """Inside, the side's model runs as the side says."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if side.run_dense:
            stack.enter_context(dense(side.model))
        if side.path != "native":
            stack.enter_context(transformers_path(side.model))
        if side.thresholds is not None:
            set_thresholds(side.model, side.thresholds, None if side.sparsity is None else 1.0 - side.sparsity)
        yield


def _by_graphs(graphs: Graphs, side: Side, tokens: Tensor, prompt_tokens: int) -> tuple[list[float], Tensor]:
    seconds, logits = graphs.decode(
        tokens, prompt_tokens, run_dense=side.run_dense, of=side.sparsity if side.thresholds is not None else None
    )
    return seconds, logits.float()


def _prefilled(side: Side, tokens: Tensor, prompt_tokens: int, capacity: int) -> tuple[Any, list[Tensor]]:
    """Returns the cache after the prompt, and the token [B, 1] of each step."""
    config = side.model.config
    cache: Any = DynamicCache(config=config) if side.step is None else StaticCache(config, max_cache_len=capacity)
    side.model(input_ids=tokens[:, :prompt_tokens], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, [tokens[:, index : index + 1].contiguous() for index in range(prompt_tokens, tokens.shape[1])]
