"""Decode speed of a model: sparse, the dense ways to run the same weights, and the machine's memory, in one run.

All sides take turns round by round and are fed the same tokens (`decoding`). The dense sides are the converted weights
with sparsity off and, given a row-major copy of the weights, that copy by our native step, by transformers' default
code, and compiled. The headline is sparse against the fastest dense side of the run, whichever it is.
Not covered: prefill speed, serving, energy; weight bytes are counted, those of the key-value cache are not.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sparsify.errors import SparsifyError
from sparsify.evals import graph_decoding
from sparsify.evals.decoding import WARM_UP_STEPS, Side, count, decode
from sparsify.evals.interleaving import Progress, Spread, in_turns, medians, ratio
from sparsify.evals.machine import CpuWait, cache_of, environment
from sparsify.evals.sides import CHECKED_STEPS, first_runs, logits_difference, prepared, sides_of
from sparsify.evals.stream import Stream
from sparsify.ledger import Ledger, ledger_of, rest_bytes
from sparsify.methods.teal import Teal
from sparsify.models import check_context
from sparsify.native_plan import problem
from sparsify.runtime import sparse_layers, switch_of

PROTOCOL = (
    "every side fed the same tokens, head and argmax included, eager with a dynamic cache (graphs and compiled: a "
    "static one), "
    "sides in turns by round, another one first each time"
)


@dataclass(frozen=True)
class Touched:
    """What one side touches: weight bytes of a step, and the share of the converted linears' bytes it leaves out.

    bytes_per_step: at batch > 1 those of the union of its tokens' channels; realised: of a token, in the timed steps.
    """

    bytes_per_step: float
    nominal_sparsity: float
    weighted_sparsity: float
    realised_sparsity: float


@dataclass(frozen=True)
class SideSpeed:
    """What one side measured.

    path: what ran its steps, by count and not by plan; share_of_stream: GB/s of touched weights over the stream's GB/s
    of the same round; limit_ms: what the stream takes for those bytes; fits_in_cache: they may stay in the last-level
    cache from step to step, so that memory is not the limit; logits_difference: as in `Side`.
    """

    about: str
    path: str
    sparse: bool
    ms_per_step: Spread
    ms_by_round: list[float]
    tokens_per_second: float
    touched: Touched
    gb_per_second: float
    share_of_stream: Spread
    limit_ms: float
    fits_in_cache: bool | None
    logits_difference: float | None


@dataclass(frozen=True)
class Speed:
    """All sides by name. ratios[a][b]: how many times as fast a is as b, from the medians of each round.

    best_dense: the dense side with the shortest median step; left_out: sides that are not here, and why;
    native_problem: why the model cannot have the native step, or on a GPU the graphs; prefill: how a sparse side's
    prompt ran; waited_for_cpu: the share of `CpuWait` over the rounds, not 0 on a machine that is busy.
    """

    sides: dict[str, SideSpeed]
    ratios: dict[str, dict[str, Spread]]
    best_dense: str
    left_out: dict[str, str]
    native_problem: str | None
    stream: dict[str, Any]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    batch: int
    prefill: str | None
    backends: list[str]
    dtype: str
    protocol: str
    waited_for_cpu: float | None
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns one document, with what the environment holds at its top."""
        document = asdict(self)
        shared: dict[str, Any] = document.pop("environment")
        return document | shared


def decode_speed(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    prompt_tokens: int,
    rounds: int = 5,
    rows: PreTrainedModel | None = None,
    compiled: bool = False,
    thresholds: Mapping[float, Mapping[str, float]] | None = None,
    counted_tokens: int | None = None,
    without: Container[str] = (),
    most_difference: float | None = None,
    progress: Progress | None = None,
) -> Speed:
    """Measures every side that there is on tokens [B, S] int64: a prompt, WARM_UP_STEPS and the steps that count.

    rows: the dense weights of a converted model once more, row-major; thresholds: TEAL's by sparsity and layer, with a
    sparse side for each; counted_tokens: steps whose kept channels are counted, all where None; without: sides that are
    not wanted; most_difference: a side whose logits are further away is not timed. Raises SparsifyError for tokens that
    are too few, too many for the model, or not [B, S], and where no dense side is left.
    """
    new_tokens = _check(model, tokens, prompt_tokens, rounds)
    tokens = tokens.to(model.device)
    with prepared(model, rows):
        planned = sides_of(model, rows, compiled=compiled, thresholds=thresholds)
        planned = [side for side in planned if side.name not in without]
        sides, failed = _working(planned, tokens, prompt_tokens, most_difference)
        if not any(side.run_dense for side in sides):
            raise SparsifyError(f"no dense side is left to compare with: {failed or 'none was wanted'}")
        last = tokens.shape[1] if counted_tokens is None else prompt_tokens + counted_tokens
        touched = {side.name: _touched(side, tokens[:, :last], prompt_tokens) for side in sides}
        stream = Stream(model.device)
        turns: dict[str, Callable[[], list[float]]] = {"stream": stream.gb_per_second}
        turns |= {side.name: _timed(side, tokens, prompt_tokens) for side in sides}
        with CpuWait() as wait:
            measured = in_turns(turns, rounds, progress)
    speeds = medians(measured.pop("stream"))
    results = {s.name: _result(s, measured[s.name], speeds, len(tokens), touched[s.name]) for s in sides}
    return Speed(
        sides=results,
        ratios={a: {b: ratio(measured[b], measured[a]) for b in measured if b != a} for a in measured},
        best_dense=_fastest({name: side for name, side in results.items() if not side.sparse}),
        left_out=failed,
        native_problem=graph_decoding.problem(model) if model.device.type == "cuda" else problem(model),
        stream={"kind": stream.kind, "buffer_bytes": stream.size, "gb_per_second": asdict(Spread.of(speeds))},
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        batch=len(tokens),
        prefill=switch_of(model).prefill if sparse_layers(model) else None,
        backends=sorted({layer.backend.name for layer in sparse_layers(model).values()}),
        dtype=str(model.dtype).removeprefix("torch."),
        protocol=PROTOCOL,
        waited_for_cpu=wait.share,
        environment=environment(model.device),
    )


def _check(model: PreTrainedModel, tokens: Tensor, prompt_tokens: int, rounds: int) -> int:
    """Returns how many steps are measured."""
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise SparsifyError(f"the tokens must be ids [batch, tokens], not of shape {list(tokens.shape)}")
    new_tokens = tokens.shape[1] - prompt_tokens - WARM_UP_STEPS
    if prompt_tokens < 1 or new_tokens < 1 or rounds < 1:
        raise SparsifyError(
            f"prompt, new tokens and rounds must be at least 1, not {prompt_tokens}, {new_tokens} and {rounds}"
        )
    check_context(model, tokens.shape[1])
    return new_tokens


def _working(
    planned: Sequence[Side], tokens: Tensor, prompt_tokens: int, most_difference: float | None
) -> tuple[list[Side], dict[str, str]]:
    """Returns the sides that run, with the path that they really take, and why others do not."""
    runs, failed = first_runs(planned, tokens, prompt_tokens)
    sides = []
    for side in planned:
        if side.name not in runs:
            continue
        # The native step leaves a call to transformers' code where something in the model asks for that.
        path = side.path if side.path != "native" or runs[side.name].native_steps == CHECKED_STEPS else "transformers"
        difference = logits_difference(side, runs, tokens, prompt_tokens)
        if difference is not None and most_difference is not None and not difference <= most_difference:
            failed[side.name] = (
                f"its logits differ by {difference:.2g} from transformers', {most_difference:g} is allowed"
            )
            continue
        sides.append(replace(side, path=path, logits_difference=difference))
    return sides, failed


def _fastest(sides: Mapping[str, SideSpeed]) -> str:
    return min(sides, key=lambda name: sides[name].ms_per_step.median)


def _timed(side: Side, tokens: Tensor, prompt_tokens: int) -> Callable[[], list[float]]:
    return lambda: decode(side, tokens, prompt_tokens).seconds[WARM_UP_STEPS:]


def _touched(side: Side, tokens: Tensor, prompt_tokens: int) -> Touched:
    if not sparse_layers(side.model):
        return Touched(rest_bytes(side.model), 0.0, 0.0, 0.0)
    ledger = ledger_of(side.model)
    if side.run_dense:
        return Touched(ledger.dense_bytes + ledger.rest_bytes, 0.0, 0.0, 0.0)
    if side.sparsity is not None:
        ledger = _as_asked(ledger, side.sparsity)
    counted = count(side, tokens, prompt_tokens)
    step = ledger.with_densities(counted.step)
    return Touched(
        step.touched_bytes + step.rest_bytes,
        ledger.nominal_sparsity,
        ledger.weighted_sparsity,
        ledger.with_densities(counted.token).weighted_sparsity,
    )


def _as_asked(ledger: Ledger, sparsity: float) -> Ledger:
    """Returns the ledger of the same linears with TEAL's thresholds of another sparsity."""
    densities = {e.name: Teal(sparsity).candidates(e.name, e.shape)[0].density for e in ledger.linears}
    return replace(ledger.with_densities(densities), nominal_sparsity=sparsity)


def _result(side: Side, rounds: list[list[float]], stream: list[float], batch: int, touched: Touched) -> SideSpeed:
    step = Spread.of([1e3 * seconds for steps in rounds for seconds in steps])
    cache = cache_of(side.model.device)
    shares = [touched.bytes_per_step / s / 1e9 / gb for s, gb in zip(medians(rounds), stream, strict=True)]
    return SideSpeed(
        about=side.about,
        path=side.path,
        sparse=not side.run_dense,
        ms_per_step=step,
        ms_by_round=[1e3 * seconds for seconds in medians(rounds)],
        tokens_per_second=1e3 * batch / step.median,
        touched=touched,
        gb_per_second=touched.bytes_per_step / step.median / 1e6,
        share_of_stream=Spread.of(shares),
        limit_ms=touched.bytes_per_step / Spread.of(stream).median / 1e6,
        fits_in_cache=None if cache is None else touched.bytes_per_step <= cache,
        logits_difference=side.logits_difference,
    )
