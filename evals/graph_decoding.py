"""Decode steps by CUDA graphs, timed one by one: what a side of a comparison on a GPU runs.

Every step is one replay; a recorded text gives its token, so that all sides do the same work, and the choice of a next
token is made all the same. Events stand between replays and nothing waits for the device until the last one. One model
has one static cache, whatever its sides; a prompt runs again only where its keys would be other ones.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.evals.stream import events
from sparsify.kernels import triton_backend
from sparsify.runtime import sparse_layers, switch_of


def problem(model: PreTrainedModel) -> str | None:
    """Returns why the GPU decode step cannot run this model, in one line; None where it can."""
    if not triton_backend.is_installed():
        return "Triton is not installed"
    from sparsify.gpu_step import problem as problem_of_step

    return problem_of_step(model)


class Graphs:
    """The decoders of one model, one for each way that its launches are made."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._decoders: dict[tuple[Any, ...], Any] = {}
        self._shape: tuple[int, int] | None = None
        self._filled: tuple[Any, ...] | None = None

    def decode(self, tokens: Tensor, prompt_tokens: int, *, run_dense: bool, of: object) -> tuple[list[float], Tensor]:
        """Returns the seconds of a step for each token of tokens [B, S] after the prompt, and the last logits [B, V].

        of: what sets the thresholds; a sparse prompt of another one has other keys.
        """
        decoder = self._decoder(len(tokens), tokens.shape[1], run_dense)
        key = (tokens.data_ptr(), tuple(tokens.shape), prompt_tokens, self._runs_dense(run_dense) or of)
        if self._filled != key:
            decoder.prefill(tokens[:, :prompt_tokens])
            self._filled = key
        step = decoder.following(tokens)
        decoder.start(tokens[:, prompt_tokens], prompt_tokens)
        seconds = timed(step, tokens.shape[1] - prompt_tokens, self.model.device)
        return seconds, decoder.logits.clone()

    def _runs_dense(self, run_dense: bool) -> bool:
        return run_dense or not sparse_layers(self.model) or switch_of(self.model).prefill == "dense"

    def _decoder(self, batch: int, length: int, run_dense: bool) -> Any:
        from sparsify.gpu_decode import GpuDecoder, rounded_up
        from sparsify.kernels.gpu.site import is_indexed
        from sparsify.kernels.gpu.tiles import table_of

        shape = (batch, rounded_up(length))
        if self._shape != shape:
            self._decoders, self._shape, self._filled = {}, shape, None
        # Lists or masks: layers that are alike in that share a graph, whatever their thresholds are.
        table = table_of(self.model.device)
        layers = () if run_dense else sparse_layers(self.model).values()
        key = (run_dense, *(is_indexed((layer.tensors(),), table) for layer in layers))
        if key not in self._decoders:
            share = next(iter(self._decoders.values())).step if self._decoders else None
            self._decoders[key] = GpuDecoder(
                self.model, batch=batch, capacity=shape[1], run_dense=run_dense, share=share
            )
        return self._decoders[key]


def timed(step: Callable[[], object], number: int, device: torch.device) -> list[float]:
    """Returns the seconds of each of `number` calls: on a GPU by events between them, without waiting in between."""
    if device.type != "cuda":
        seconds = []
        for _ in range(number):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        return seconds
    marks = events(number + 1)
    torch.cuda.synchronize(device)
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return [1e-3 * float(first.elapsed_time(second)) for first, second in pairwise(marks)]
