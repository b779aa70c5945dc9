"""Decode speed beside llama.cpp's, the same weights in one process: `python -m sparsify.evals.llama_cpp --help`.

A model of random weights (sparsify.evals.shapes) is written as GGUF files and run by llama-cpp-python, in turns with
transformers' own code and with the converted model. Nothing is timed before every dense side has been seen to compute
the same logits. All sides are fed the same random tokens and take the largest logit in the timed step.
Needs the packages of the extra `compare`. Not covered: prefill, batches, quality (the weights are random), and
llama.cpp's K-quants, which the gguf package cannot write.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.conversion import convert
from sparsify.errors import SparsifyError, UnavailableError, suggest
from sparsify.evals.decoding import WARM_UP_STEPS, Decoded, Side, count, decode
from sparsify.evals.interleaving import Spread, in_turns, medians, ratio
from sparsify.evals.machine import environment
from sparsify.evals.shapes import random_calibration, random_model, random_tokens, shape_config, teal_thresholds
from sparsify.evals.sides import CHECKED_STEPS, first_run, prepared, sides_of
from sparsify.evals.stream import Stream
from sparsify.ledger import ledger_of, rest_bytes
from sparsify.methods.teal import Teal
from sparsify.models import check_context
from sparsify.runtime import sparse_layers

# The least cosine of a format's logits with transformers' in bf16, for it to be timed. After 22 blocks rounding leaves
# 0.9995, and rows of q and k in the wrong order 0.6. What 4 bits lose is not rounding: about 0.8 is left.
FORMATS = {"F16": 0.995, "BF16": 0.995, "Q8_0": 0.98, "Q4_0": 0.5}
_EXACT = 0.995
REFERENCE = "transformers"

_CHECKED_PROMPT = 12
_CALIBRATION_WINDOWS = 4
_PROTOCOL = (
    "one process, sides in turns by round, another one first each time; all are fed the same random tokens; the head "
    "and the largest logit are timed; Q formats hold every matrix, the head too; llama.cpp with its defaults, mmap"
)

_log = logging.getLogger("sparsify.evals.llama_cpp")


@dataclass(frozen=True)
class Settings:
    """What is measured. threads: of every side, None for torch's number of now; new_tokens: timed steps a round."""

    shape: str = "tinyllama-1.1b"
    sparsities: Sequence[float] = (0.0, 0.5, 0.7)
    formats: Sequence[str] = tuple(FORMATS)
    threads: int | None = None
    context: int = 128
    new_tokens: int = 40
    rounds: int = 5
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens that a round takes."""
        return self.context + WARM_UP_STEPS + self.new_tokens


@dataclass(frozen=True)
class SideResult:
    """One side's decoding. path: the code that ran its steps; bytes_per_token: of weights, the cache's not counted.

    share_of_stream: GB/s of those bytes over the stream's of the same round; realised_sparsity: in the timed steps;
    cosine: of a dense side's logits with transformers', after a few tokens.
    """

    path: str
    ms_per_token: Spread
    ms_by_round: list[float]
    tokens_per_second: float
    bytes_per_token: float
    gb_per_second: float
    share_of_stream: Spread
    realised_sparsity: float | None
    cosine: float | None


@dataclass(frozen=True)
class Comparison:
    """All sides by name. ratios[a][b]: how many times as fast a is as b, from the medians of each round."""

    settings: Settings
    sides: dict[str, SideResult]
    ratios: dict[str, dict[str, Spread]]
    stream: dict[str, Any]
    dtype: str
    protocol: str
    llama_cpp: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    """A side before it is timed; turn gives the seconds of one round's steps."""

    path: str
    turn: Callable[[], list[float]]
    bytes_per_token: float
    realised_sparsity: float | None
    cosine: float | None


def compare(settings: Settings, *, folder: Path | None = None) -> Comparison:
    """Times every side in turns. folder keeps the GGUF files for the next run with the same shape and seed.

    Raises SparsifyError for an unknown shape or format, or a side that computes another model than transformers;
    UnavailableError where a package is missing.
    """
    _check(settings)
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsify-gguf-")))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        rows = random_model(settings.shape, seed=settings.seed)
        check_context(rows, settings.length)
        model, thresholds = _converted(rows, settings)
        stack.enter_context(prepared(model, rows))
        sides = sides_of(model, rows, thresholds=thresholds)
        entries = _entries(sides, settings, rows, folder, stack)
        stream = Stream(rows.device)
        turns = {"stream": stream.gb_per_second} | {name: entry.turn for name, entry in entries.items()}
        measured = in_turns(turns, settings.rounds, lambda done, of: _log.info("round %s of %s", done, of))
        return _result(settings, entries, measured, stream, rows)


def write_gguf(model: PreTrainedModel, path: Path, quantisation: str) -> None:
    """Writes a Llama or Qwen2 as a GGUF file for llama.cpp: matrices in one format, vectors in F32, no vocabulary.

    Tensor by tensor, so that one is in memory at a time; the file appears when it is whole.
    Raises SparsifyError for another architecture or format.
    """
    gguf, plan = _package("gguf"), _plan(model, quantisation)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(staged, model.config.model_type)
    for key, value in _metadata(model.config, quantisation).items():
        getattr(writer, f"add_{key}")(value)
    for t in plan:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.size, raw_dtype=t.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in plan:
            writer.write_tensor_data(gguf.quants.quantize(t.read(), t.kind))
        writer.close()
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def gguf_bytes_per_token(model: PreTrainedModel, quantisation: str) -> int:
    """Returns the weight bytes of the GGUF file that one token touches: all, of an untied embedding one row."""
    tied = model.config.tie_word_embeddings
    return sum(t.size // (1 if tied or not t.is_embedding else t.shape[0]) for t in _plan(model, quantisation))


def rope_pairs(weight: Tensor, heads: int) -> Tensor:
    """Returns the rows [heads · D, …] of a q or k projection in the order of llama.cpp's rope.

    transformers turns the channels (i, i + D/2) of a head together, llama.cpp's `llama` architecture (2i, 2i + 1);
    convert_hf_to_gguf.py does the same. Its `qwen2` turns them as transformers does.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def render(comparison: Comparison) -> str:
    """Returns the comparison as a Markdown table; × columns: how many times faster, the median over rounds."""
    s, where = comparison.settings, comparison.environment
    against = [name for name in comparison.sides if name == REFERENCE or name.startswith("llama.cpp")]
    head = ["side", "ms a token (p10–p90)", "tok/s", "MB a token", "GB/s", "of stream", "realised", "cosine"]
    rows = [head + [f"× {name}" for name in against], ["---"] * (len(head) + len(against))]
    for name, side in comparison.sides.items():
        ms, realised, ratios = side.ms_per_token, side.realised_sparsity, comparison.ratios[name]
        rows.append([
            name, f"{ms.median:.2f} ({ms.p10:.2f}–{ms.p90:.2f})", f"{side.tokens_per_second:.1f}",
            f"{side.bytes_per_token / 1e6:.1f}", f"{side.gb_per_second:.1f}", f"{side.share_of_stream.median:.0%}",
            "" if realised is None else f"{realised:.1%}", "" if side.cosine is None else f"{side.cosine:.4f}",
            *(f"{ratios[other].median:.2f}" if other in ratios else "" for other in against),
        ])  # fmt: skip
    stream = comparison.stream
    caption = (
        f"{s.shape}, random {comparison.dtype} weights, {s.context} tokens of context, {s.rounds} × {s.new_tokens} "
        f"steps; {where['threads']} threads of {where['cpu']} ({where['isa']}), {stream['kind']} "
        f"{stream['gb_per_second']['median']:.1f} GB/s; {where['date']}"
    )
    return "\n".join([caption, "", *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.llama_cpp", description=__doc__)
    default = Settings()
    parser.add_argument("--shape", default=default.shape, help="a shape of sparsify.evals.shapes (%(default)s)")
    parser.add_argument("--sparsities", nargs="*", type=float, default=default.sparsities)
    parser.add_argument("--formats", nargs="*", default=default.formats, help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--threads", type=int, help="of every side (torch's default)")
    parser.add_argument("--context", type=int, default=default.context, help="tokens before the timed ones")
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens, help="timed tokens a round")
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--folder", type=Path, help="keep the GGUF files here, and take those that are here")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="write the result here")
    values = vars(parser.parse_args(arguments))
    folder, save = values.pop("folder"), values.pop("save")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    _log.setLevel(logging.INFO)
    try:
        comparison = compare(Settings(**values), folder=folder)
    except SparsifyError as error:
        _log.error("error: %s", error)
        return error.exit_code
    sys.stdout.write(render(comparison))
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(asdict(comparison), indent=1) + "\n", encoding="utf-8")
    return 0


def _check(settings: Settings) -> None:
    shape_config(settings.shape)
    _package("llama_cpp")
    for name in settings.formats:
        _quantisation(name)
    for sparsity in settings.sparsities:
        Teal(sparsity)
    for field in ("context", "new_tokens", "rounds", "threads"):
        value = getattr(settings, field)
        if value is not None and value < 1:
            raise SparsifyError(f"{field.replace('_', ' ')} must be at least 1, not {value}")


def _converted(rows: PreTrainedModel, settings: Settings) -> tuple[PreTrainedModel, dict[float, dict[str, float]]]:
    """Returns the same weights converted, one copy for all sparsities, and the thresholds of each."""
    length = settings.context + settings.new_tokens
    calibration = random_calibration(rows, _CALIBRATION_WINDOWS, length, seed=settings.seed + 1)
    # Fitted on the positions that are timed.
    thresholds = teal_thresholds(rows, calibration, settings.sparsities, skip=settings.context)
    model = random_model(settings.shape, seed=settings.seed)
    return convert(model, Teal(max(settings.sparsities, default=0.0)), calibration), thresholds


def _entries(
    sides: Sequence[Side], settings: Settings, rows: PreTrainedModel, folder: Path, stack: ExitStack
) -> dict[str, _Entry]:
    """Returns every side, checked. Raises SparsifyError where one computes another model than transformers."""
    tokens = random_tokens(rows, 1, max(settings.length, _CHECKED_PROMPT + CHECKED_STEPS), seed=settings.seed)
    expected = next(first_run(side, tokens, _CHECKED_PROMPT).logits[0] for side in sides if side.name == REFERENCE)
    entries = {side.name: _own(side, tokens, settings, expected) for side in sides}
    for quantisation in dict.fromkeys(settings.formats):
        path = folder / f"{settings.shape}-seed{settings.seed}-{quantisation}.gguf"
        if not path.exists():
            _log.info("writing %s", path)
            write_gguf(rows, path, quantisation)
        llama = _LlamaCpp(path, positions=tokens.shape[1])
        stack.callback(llama.close)
        checked = llama.decode(tokens[0, : _CHECKED_PROMPT + CHECKED_STEPS].tolist(), _CHECKED_PROMPT)
        cosine = _cosine(path.name, checked.logits, expected, FORMATS[quantisation])
        turn = partial(_other_turn, llama, tokens[0, : settings.length].tolist(), settings.context)
        size = gguf_bytes_per_token(rows, quantisation)
        entries[f"llama.cpp {quantisation}"] = _Entry("llama.cpp", turn, size, None, cosine)
    return entries


def _own(side: Side, tokens: Tensor, settings: Settings, expected: Tensor) -> _Entry:
    """Returns a side of ours or transformers' own; what was planned to run natively says so only where it does."""
    checked = first_run(side, tokens, _CHECKED_PROMPT)
    if side.path == "native" and checked.native_steps != CHECKED_STEPS:
        side = replace(side, path="transformers")
    exact = side.run_dense or side.sparsity == 0
    cosine = _cosine(side.name, checked.logits[0], expected, _EXACT) if exact else None
    timed = tokens[:, : settings.length]
    size, realised = _touched(side, timed, settings.context)
    return _Entry(side.path, partial(_own_turn, side, timed, settings.context), size, realised, cosine)


def _touched(side: Side, tokens: Tensor, context: int) -> tuple[float, float | None]:
    """Returns the weight bytes of a token, and the sparsity that the timed steps have; untimed."""
    if not sparse_layers(side.model):
        return rest_bytes(side.model), None
    ledger = ledger_of(side.model)
    if side.run_dense:
        return ledger.dense_bytes + ledger.rest_bytes, None
    ledger = ledger.with_densities(count(side, tokens, context).token)
    return ledger.touched_bytes + ledger.rest_bytes, ledger.weighted_sparsity


def _cosine(name: str, logits: Tensor, expected: Tensor, least: float) -> float:
    cosine = float(torch.cosine_similarity(logits.double(), expected.double(), dim=0))
    # Not >= is true for NaN as well.
    if not cosine >= least:
        raise SparsifyError(
            f"{name} computes another model than {REFERENCE}: the cosine of their logits is {cosine:.4f} and should be "
            f"at least {least}, so nothing was timed; a GGUF file of another version is made anew once it is deleted"
        )
    return cosine


def _own_turn(side: Side, tokens: Tensor, context: int) -> list[float]:
    return decode(side, tokens, context).seconds[WARM_UP_STEPS:]


def _other_turn(llama: "_LlamaCpp", tokens: Sequence[int], context: int) -> list[float]:
    return llama.decode(tokens, context).seconds[WARM_UP_STEPS:]


class _LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, with torch's number of threads and the file mapped into memory."""

    def __init__(self, path: Path, *, positions: int) -> None:
        self._package, threads = _package("llama_cpp"), torch.get_num_threads()
        try:
            self._model = self._package.Llama(
                model_path=str(path), n_ctx=positions, n_batch=positions, n_threads=threads, n_threads_batch=threads,
                n_gpu_layers=0, use_mmap=True, logits_all=False, verbose=False,
            )  # fmt: skip
        except ValueError as problem:
            raise UnavailableError(f"llama.cpp does not load {path}: {problem}") from problem
        self._vocabulary = self._model.n_vocab()
        self.close = self._model.close

    def decode(self, tokens: Sequence[int], prompt_tokens: int) -> Decoded:
        """As decoding.decode, for one sequence; logits [V]."""
        seconds: list[float] = []
        self._model.reset()
        self._model.eval(tokens[:prompt_tokens])
        for token in tokens[prompt_tokens:]:
            started = time.perf_counter()
            self._model.eval([token])
            pointer = self._package.llama_get_logits_ith(self._model.ctx, -1)
            # Not torch's argmax: its threads, once woken for many logits, would spin beside llama.cpp's.
            logits = np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))
            logits.argmax()
            seconds.append(time.perf_counter() - started)
        # Copied: llama.cpp writes the next step's there.
        return Decoded(seconds, torch.tensor(logits), 0)


def _result(
    settings: Settings,
    entries: Mapping[str, _Entry],
    measured: dict[str, list[list[float]]],
    stream: Stream,
    rows: PreTrainedModel,
) -> Comparison:
    speeds = medians(measured.pop("stream"))
    llama_cpp, gguf = _package("llama_cpp"), version("gguf")
    where = environment(rows.device)
    where["versions"] |= {"llama-cpp-python": llama_cpp.__version__, "gguf": gguf}
    return Comparison(
        settings=settings,
        sides={name: _side(entry, measured[name], speeds) for name, entry in entries.items()},
        ratios={a: {b: ratio(measured[b], measured[a]) for b in measured if b != a} for a in measured},
        stream={"kind": stream.kind, "buffer_bytes": stream.size, "gb_per_second": asdict(Spread.of(speeds))},
        dtype=str(rows.dtype).removeprefix("torch."),
        protocol=_PROTOCOL,
        llama_cpp=llama_cpp.llama_print_system_info().decode().strip(),
        environment=where,
    )


def _side(entry: _Entry, rounds: list[list[float]], stream: list[float]) -> SideResult:
    spread = Spread.of([1e3 * seconds for steps in rounds for seconds in steps])
    by_round = medians(rounds)
    shares = [entry.bytes_per_token / seconds / 1e9 / gb for seconds, gb in zip(by_round, stream, strict=True)]
    return SideResult(
        path=entry.path,
        ms_per_token=spread,
        ms_by_round=[1e3 * seconds for seconds in by_round],
        tokens_per_second=1e3 / spread.median,
        bytes_per_token=entry.bytes_per_token,
        gb_per_second=entry.bytes_per_token / spread.median / 1e6,
        share_of_stream=Spread.of(shares),
        realised_sparsity=entry.realised_sparsity,
        cosine=entry.cosine,
    )


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file: read gives it as fp32; size in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    size: int
    is_embedding: bool
    read: Callable[[], Any]


def _plan(model: PreTrainedModel, quantisation: str) -> list[_Planned]:
    gguf, config = _package("gguf"), model.config
    matrices, heads = _quantisation(quantisation), _permuted_heads(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    embedding = model.get_input_embeddings().weight
    planned = []
    # A tied head is not named twice; llama.cpp takes the embedding where there is no head.
    for name, tensor in model.named_parameters():
        kind = matrices if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = tuple(tensor.shape)
        if shape[-1] % block:
            raise SparsifyError(
                f"{name} {list(shape)} has rows that are no multiple of {quantisation}'s {block} weights"
            )
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        read = partial(_read, tensor, heads.get(name.split(".")[-2]))
        planned.append(_Planned(target, shape, kind, tensor.numel() // block * block_bytes, tensor is embedding, read))
    return planned


def _read(tensor: Tensor, heads: int | None) -> Any:
    return (tensor if heads is None else rope_pairs(tensor, heads)).detach().float().numpy()


def _permuted_heads(config: Any) -> dict[str, int]:
    if config.model_type not in ("llama", "qwen2"):
        raise SparsifyError(f"a {config.model_type} is not written as GGUF here: llama and qwen2 are")
    if (kind := config.rope_parameters["rope_type"]) != "default":
        raise SparsifyError(f"rope scaling {kind!r} is not written as GGUF here: only plain rope is")
    if config.model_type == "qwen2":
        return {}
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def _metadata(config: Any, quantisation: str) -> dict[str, Any]:
    """Returns what the file says of the model, by the names of GGUFWriter's methods without their `add_`."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "name": "random weights",
        "file_type": {"F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}[quantisation],
        "quantization_version": _package("gguf").GGML_QUANT_VERSION,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head,
        "value_length": head,
        "rope_dimension_count": head,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
        # Without a vocabulary llama.cpp takes the number of tokens from here: it is given token ids only.
        "vocab_size": config.vocab_size,
        "tokenizer_model": "no_vocab",
    }


def _quantisation(name: str) -> Any:
    if name not in FORMATS:
        raise SparsifyError(f"unknown format {name!r}: known are {', '.join(FORMATS)}.{suggest(name, FORMATS)}")
    return _package("gguf").GGMLQuantizationType[name]


def _package(name: str) -> Any:
    """Imports a package of the extra `compare`. Raises UnavailableError where it is missing or does not load."""
    how = "`pip install 'sparsify-llm[compare]'` (or: pip install llama-cpp-python gguf) installs what is needed"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name != name:
            raise
        raise UnavailableError(f"the package {name} is not installed: {how}") from None
    except (OSError, RuntimeError) as problem:
        raise UnavailableError(f"the package {name} does not load here ({problem}): {how}") from problem


if __name__ == "__main__":
    sys.exit(main())
