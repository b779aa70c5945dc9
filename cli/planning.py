"""What `sparsify plan` and `--dry-run` find out before anything runs: from the config and the headers, no weight read.

The checks are those of the conversion, in its order, and raise its errors. What only a text or a tokenizer that is not
here could tell is said in the plan in the place of an error.
"""

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.cli.budgets import settle_budget
from sparsify.cli.conversion import allocate, check_model, check_out, configure, read_texts
from sparsify.cli.loading import pick_device
from sparsify.cli.ppl_p_conversion import PPL_P, check_ppl_p
from sparsify.cli.progress import Progress
from sparsify.cli.relufy_conversion import is_relufy, relufication_of, settle_relufy
from sparsify.cli.settings import ConvertSettings
from sparsify.cli.sites import describe_sites
from sparsify.errors import SparsifyError, UnavailableError

if TYPE_CHECKING:
    import torch

    from sparsify.allocation import Allocation
    from sparsify.calibration import Calibration
    from sparsify.conversion_cost import Load
    from sparsify.methods import AnyMethod
    from sparsify.model_size import ModelSize
    from sparsify.plan import ConversionPlan, Range
    from sparsify.skeleton import Skeleton

# What a checkpoint has besides tensors: a linear's entries in config and ledger with its line in the header, and the
# card, the settings and the rest of the config.
_BESIDE_LINEAR, _BESIDE = 900, 12_000
# Tries of a budget by quality: eight halvings, and one more where the last was not the best.
_TRIES = 9
# What CUDA itself takes of a GPU.
_CUDA_BYTES = 600 << 20


@dataclass(frozen=True)
class _Asked:
    """The settings, settled, with what they configure."""

    given: ConvertSettings
    settings: ConvertSettings
    method: "AnyMethod | None"
    allocation: "Allocation | None"
    device: str
    spec: str


def plan_settings(given: ConvertSettings, progress: Progress, *, stream: bool = False) -> dict[str, Any]:
    """Returns the plan of the conversion that the settings ask for; nothing is calibrated or written.

    stream: of the one that has one block in memory.
    Raises SparsifyError as the conversion does for what can be known by now.
    """
    import torch

    from sparsify.model_size import model_size
    from sparsify.skeleton import read_skeleton

    started = time.monotonic()
    asked = _settle(given)
    settings = asked.settings
    if stream and (problem := _not_streamed(asked)) is not None:
        raise SparsifyError(problem)
    out = None if settings.out is None else check_out(settings.out)
    calibration, unread = _texts(asked, progress)
    skeleton = read_skeleton(asked.spec, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    _check_model(skeleton, settings, calibration)
    planned = _plan(asked, skeleton)
    load = _load(asked, torch.device(asked.device), skeleton, time.monotonic() - started)
    size = model_size(skeleton.model)
    sites = describe_sites(skeleton.model, planned.targets)
    progress.note("measuring this machine")
    found = {
        "model": asked.spec,
        "dry_run": True,
        "stream": stream,
        "settings": asdict(given),
        "read_from": skeleton.read_from,
        "dtype": str(skeleton.model.dtype).removeprefix("torch."),
        "device": asked.device,
        **sites,
        "left_dense": list(planned.left_dense),
        "method": settings.method,
        "allocation": planned.allocation,
        "rotated": planned.rotated,
        "parameters": _parameters(skeleton, planned),
        "unread": unread,
    }
    found["checkpoint"] = _checkpoint(planned, skeleton, out)
    found["memory"], found["time"] = _cost(asked, planned, size, load)
    if stream:
        _add_room(found["checkpoint"], size, load)
    return found | {"verdict": _verdict(found)}


def _settle(given: ConvertSettings) -> _Asked:
    by_neurons = given.method == PPL_P
    if by_neurons:
        check_ppl_p(given)
    settings = settle_budget(settle_relufy(given))
    method = None if by_neurons else configure(settings)
    allocation = None if method is None else allocate(settings, method)
    return _Asked(given, settings, method, allocation, pick_device(settings.device), check_model(settings.model))


def _texts(asked: _Asked, progress: Progress) -> "tuple[Calibration | None, str | None]":
    """Returns the calibration, or why it cannot be read from here: no tokenizer beside the config, no network."""
    from sparsify.models import load_tokenizer

    try:
        load_tokenizer(asked.spec, trust_remote_code=asked.settings.trust_remote_code)
    except SparsifyError as problem:
        return None, str(problem)
    try:
        _, calibration, _, _ = read_texts(asked.spec, asked.settings, progress)
    except UnavailableError as problem:
        return None, str(problem)
    return calibration, None


def _check_model(skeleton: "Skeleton", settings: ConvertSettings, calibration: "Calibration | None") -> None:
    from sparsify.conversion import check_tokens
    from sparsify.models import check_context

    check_context(skeleton.model, settings.seq_len)
    if calibration is not None:
        check_tokens(skeleton.model, calibration.tokens)


def _plan(asked: _Asked, skeleton: "Skeleton") -> "ConversionPlan":
    import torch

    from sparsify.evals.neurons import layers_of
    from sparsify.plan import plan_conversion, plan_dense, plan_scaled
    from sparsify.relufication import relufy_unfitted

    model = skeleton.model
    if is_relufy(asked.given):
        relufy_unfitted(model, relufication_of(asked.given))
        if asked.given.plain:
            return plan_dense(model)
    if asked.method is None:
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        return plan_scaled(model, [layer.name for layer in layers_of(model, "mlp", tokens)])
    return plan_conversion(model, asked.method, allocation=asked.allocation, rotate=asked.settings.rotate)


def _load(asked: _Asked, device: "torch.device", skeleton: "Skeleton", seconds: float) -> "Load":
    from sparsify.conversion_cost import Load
    from sparsify.evals.machine import resident_memory
    from sparsify.kernels.dispatch import preferred_backend

    settings, hidden = asked.settings, int(skeleton.model.config.get_text_config(decoder=True).hidden_size)
    by_quality = settings.max_ppl_increase is not None and asked.method is not None
    on_cpu = device.type == "cpu"
    stored = skeleton.stored or {}
    dtypes = {tensor.dtype for tensor in stored.values()}
    same = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}
    kept = {same.get(dtype) for dtype in dtypes} == {str(skeleton.model.dtype).removeprefix("torch.")}
    return Load(
        windows=settings.sequences,
        seq_len=settings.seq_len,
        eval_windows=settings.eval_windows,
        base_bytes=resident_memory() if on_cpu else _CUDA_BYTES,
        base_seconds=seconds,
        runs=_TRIES if by_quality else 1,
        held_out=(settings.held_out or 0) if by_quality else 0,
        channel_contiguous=preferred_backend(device, skeleton.model.dtype, hidden, hidden).channel_contiguous,
        mapped=on_cpu and kept,
    )


def _parameters(skeleton: "Skeleton", planned: "ConversionPlan") -> dict[str, Any]:
    model = skeleton.model
    every = sum({id(p): p.numel() for p in model.parameters()}.values())
    converted = sum(shape.outputs * shape.inputs for shape in planned.shapes.values())
    return {"all": every, "converted": converted, "share": converted / every}


def _checkpoint(planned: "ConversionPlan", skeleton: "Skeleton", out: Path | None) -> dict[str, Any]:
    beside = _BESIDE + _BESIDE_LINEAR * len(planned.shapes) + _tokenizer_bytes(skeleton.folder)
    weights = planned.weight_bytes
    place = Path.cwd() if out is None else out.absolute().parent
    while not place.exists():
        place = place.parent
    return {
        "dense_bytes": planned.dense_bytes,
        "added": {kind: _pair(size) for kind, size in planned.added.items()},
        "added_bytes": _pair(planned.added_bytes),
        "tensor_bytes": _pair(weights),
        "beside_bytes": beside,
        "bytes": [weights.least + beside, weights.most + beside],
        "exact": weights.least == weights.most,
        "disk_free": shutil.disk_usage(place).free,
        "disk": str(place),
    }


def _pair(size: "Range") -> list[int]:
    return [size.least, size.most]


def _tokenizer_bytes(folder: Path | None) -> int:
    if folder is None:
        return 0
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
    return sum(os.path.getsize(folder / name) for name in names if (folder / name).is_file())


def _cost(
    asked: _Asked, planned: "ConversionPlan", size: "ModelSize", load: "Load"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the plan says of memory and of time."""
    import torch

    from sparsify.allocation import Work
    from sparsify.conversion_cost import TIME_RANGE, stages_in_memory, streamed_peak, work_size
    from sparsify.evals.machine import available_memory
    from sparsify.evals.rates import measure_rates

    device = torch.device(asked.device)
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[size.element_size]
    rates = measure_rates(device, dtype, asked.settings.seq_len)
    method = asked.method
    rest = getattr(method, "rest", method)
    svd = str(getattr(rest, "svd", "auto"))
    work = Work()
    if asked.allocation is not None and planned.options:
        work = asked.allocation.work(work_size(planned, size, load, asked.settings.sparsity or 0.5))
    stages = stages_in_memory(size, planned, work, svd, load, rates)
    ranks = {name: max(c.rank for c in ways) for name, ways in planned.options.items()}
    problem = _not_streamed(asked)
    memory = {
        "peak": max(stage.bytes for stage in stages),
        "needed": max(stage.needed for stage in stages),
        "streamed_peak": None if problem else streamed_peak(size, planned.shapes, ranks, svd, load),
        "not_streamed": problem,
        "available": available_memory(device),
        "of": "the GPU" if device.type == "cuda" else "this machine",
        "process": load.base_bytes,
        "weights": size.dense_bytes,
    }
    seconds = sum(stage.seconds for stage in stages)
    return memory | {"stages": {s.name: s.bytes for s in stages if s.bytes}}, {
        "seconds": seconds,
        "range": [seconds * factor for factor in TIME_RANGE],
        "stages": {s.name: s.seconds for s in stages},
        "rates": asdict(rates),
        "not_counted": _not_counted(asked),
    }


def _not_streamed(asked: _Asked) -> str | None:
    """Returns why the conversion cannot go block by block, as --stream itself says it; None where it can."""
    from sparsify.cli.stream_conversion import refuse_unstreamable
    from sparsify.streaming.conversion import streaming_problem

    try:
        refuse_unstreamable(asked.given)
    except SparsifyError as problem:
        return str(problem)
    if asked.method is None or asked.allocation is None:
        return f"method {asked.settings.method} changes the whole model: leave --stream out"
    return streaming_problem(asked.method, asked.allocation, rotate=asked.settings.rotate)


def _add_room(checkpoint: dict[str, Any], size: "ModelSize", load: "Load") -> None:
    """Adds what a streamed conversion has on the disk besides: hidden states, and the parts of a single file."""
    from sparsify.weight_files import SINGLE_FILE_BYTES

    windows = load.windows + 2 * load.eval_windows
    states = 2 * windows * load.seq_len * size.hidden * size.element_size
    parts = checkpoint["tensor_bytes"][1] if size.dense_bytes <= SINGLE_FILE_BYTES else 0
    checkpoint["while_streaming"] = states + parts


def _not_counted(asked: _Asked) -> list[str]:
    left_out = []
    if asked.given.reconstruct:
        left_out.append("fitting the MLPs to their dense outputs (--reconstruct)")
    if asked.settings.speedup is not None:
        left_out.append("measuring costs for --speedup")
    if asked.method is None:
        left_out.append("the search of method ppl-p")
    return left_out


def _verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Returns whether it fits here, and what is in the way and helps, in sentences."""
    from sparsify.cli.output import byte_count

    memory, checkpoint = found["memory"], found["checkpoint"]
    available, said = memory["available"], []
    disk = checkpoint["bytes"][1] + checkpoint.get("while_streaming", 0)
    needed = memory["streamed_peak"] if found["stream"] else memory["needed"]
    memory_fits = available is None or needed <= available
    if not memory_fits:
        here = f"{byte_count(available)} are available on {memory['of']}"
        said = [f"It needs {byte_count(needed)} of memory and {here}.", _other_way(found, available)]
    disk_fits = checkpoint["disk_free"] >= disk
    if not disk_fits:
        said.append(
            f"It needs {byte_count(disk)} of disk and {byte_count(checkpoint['disk_free'])} are free in "
            f"{checkpoint['disk']}: free some, or choose another --out."
        )
    return {"fits": memory_fits and disk_fits, "memory_fits": memory_fits, "disk_fits": disk_fits, "said": said}


def _other_way(found: dict[str, Any], available: int) -> str:
    """Returns what to do where the memory is too small."""
    from sparsify.cli.output import byte_count

    streamed = found["memory"]["streamed_peak"]
    if streamed is None:
        return f"It cannot be streamed either: {found['memory']['not_streamed']}."
    if found["stream"] or streamed > available:
        return "Not even one block at a time fits: use a machine with more memory."
    return f"With --stream it takes one block at a time, about {byte_count(streamed)}."
