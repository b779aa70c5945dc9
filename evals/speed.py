"""Decode speed of a converted model, dense against sparse, interleaved in one process.

The same loop for both: prefill the prompt, a few unmeasured steps, then one-token greedy steps on a dynamic KV cache,
each timed with the device waited for. Dense and sparse take turns round by round, so that a machine that slows down
slows both, and the ratio is paired by round. Dense here is the same model with its layers switched to dense, in eager
mode: not the strongest dense baseline there is (compiled, graphed), which is to be reported beside it.
Not covered: batch serving, prefill speed, energy.
"""

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import sparsify
from sparsify.errors import SparsifyError
from sparsify.evals.realised import RealisedDensity
from sparsify.ledger import ledger_of, rest_bytes
from sparsify.models import check_context
from sparsify.runtime import dense, sparse_layers, switch_of

_WARM_UP_STEPS = 4
_COPY_BYTES = 1 << 27


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


@dataclass(frozen=True)
class Decoding:
    """One side: milliseconds a step, tokens a second, weight bytes a token touches, and their GB/s."""

    ms_per_step: Spread
    tokens_per_second: float
    bytes_per_token: float
    gb_per_second: float


@dataclass(frozen=True)
class Speed:
    """Dense and sparse decoding of one model. ratio: dense / sparse step time, one value a round (above 1: faster).

    bytes_per_token counts all weights that a token touches, the sparse side with the densities of this very run;
    at batch > 1 those of one token, not of the batch's union. copy_gb_per_second: what a plain copy reads and writes
    here. A dense model has the dense side only.
    """

    dense: Decoding
    sparse: Decoding | None
    ratio: Spread | None
    realised_sparsity: float | None
    prompt_tokens: int
    new_tokens: int
    rounds: int
    batch: int
    prefill: str | None
    protocol: str
    backends: list[str]
    dtype: str
    device: str
    threads: int
    copy_gb_per_second: float
    versions: dict[str, str]
    date: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decode_speed(
    model: PreTrainedModel,
    prompt: Tensor,
    *,
    new_tokens: int = 64,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Times `rounds` rounds of `new_tokens` steps after prompt [B, P] (int64), dense and sparse in turn.

    progress is called with (rounds done, rounds in all). Raises SparsifyError for a prompt that is empty or too long.
    """
    _check(model, prompt, new_tokens, rounds)
    prompt = prompt.to(model.device)
    sides = (True, False) if sparse_layers(model) else (True,)
    steps: dict[bool, list[list[float]]] = {side: [] for side in sides}
    was_training = model.training
    model.train(False)
    try:
        with RealisedDensity(model) as realised:
            for side in sides:
                _decode(model, prompt, new_tokens, run_dense=side)
        for index in range(rounds):
            # Who goes first changes by round.
            for side in sides if index % 2 == 0 else sides[::-1]:
                steps[side].append(_decode(model, prompt, new_tokens, run_dense=side))
            if progress is not None:
                progress(index + 1, rounds)
    finally:
        model.train(was_training)
    return Speed(
        **_compared(model, steps, len(prompt), realised),
        prompt_tokens=prompt.shape[1],
        new_tokens=new_tokens,
        rounds=rounds,
        batch=len(prompt),
        protocol="eager, dynamic KV cache, greedy, head included, dense and sparse interleaved by round",
        **_environment(model),
    )


def _compared(
    model: PreTrainedModel, steps: dict[bool, list[list[float]]], batch: int, realised: RealisedDensity
) -> dict[str, Any]:
    if False not in steps:
        side = _decoding(steps[True], batch, rest_bytes(model))
        return {"dense": side, "sparse": None, "ratio": None, "realised_sparsity": None, "prefill": None}
    ledger = ledger_of(model).with_densities(realised.densities())
    pairs = zip(steps[True], steps[False], strict=True)
    return {
        "dense": _decoding(steps[True], batch, ledger.dense_bytes + ledger.rest_bytes),
        "sparse": _decoding(steps[False], batch, ledger.touched_bytes + ledger.rest_bytes),
        "ratio": Spread.of([statistics.median(a) / statistics.median(b) for a, b in pairs]),
        "realised_sparsity": ledger.weighted_sparsity,
        "prefill": switch_of(model).prefill,
    }


def _check(model: PreTrainedModel, prompt: Tensor, new_tokens: int, rounds: int) -> None:
    if prompt.dim() != 2 or prompt.numel() == 0:
        raise SparsifyError(f"the prompt must be token ids [batch, tokens], not of shape {list(prompt.shape)}")
    if new_tokens < 1 or rounds < 1:
        raise SparsifyError(f"new tokens and rounds must be at least 1, not {new_tokens} and {rounds}")
    check_context(model, prompt.shape[1] + _WARM_UP_STEPS + new_tokens)


@torch.inference_mode()
def _decode(model: PreTrainedModel, prompt: Tensor, new_tokens: int, *, run_dense: bool) -> list[float]:
    """Returns the seconds of each measured step."""
    times = []
    with dense(model) if run_dense else nullcontext():
        cache = DynamicCache(config=model.config)
        logits = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        for _ in range(_WARM_UP_STEPS + new_tokens):
            _wait(model.device)
            started = time.perf_counter()
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            _wait(model.device)
            times.append(time.perf_counter() - started)
    return times[_WARM_UP_STEPS:]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _decoding(rounds: list[list[float]], batch: int, bytes_per_token: float) -> Decoding:
    spread = Spread.of([1e3 * seconds for steps in rounds for seconds in steps])
    seconds = spread.median / 1e3
    return Decoding(spread, batch / seconds, bytes_per_token, bytes_per_token / seconds / 1e9)


def _environment(model: PreTrainedModel) -> dict[str, Any]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({_processor()})"
    return {
        "backends": sorted({layer.backend.name for layer in sparse_layers(model).values()}),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": name,
        "threads": torch.get_num_threads(),
        "copy_gb_per_second": _copy_speed(device),
        "versions": {
            "sparsify": sparsify.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _copy_speed(device: torch.device) -> float:
    """Returns GB/s read plus written by a copy of 128 MB, the median of five."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * _COPY_BYTES / statistics.median(seconds[1:]) / 1e9
