"""What one decoded token costs on a GPU before any GPU is there: launches, and the bytes that must be moved.

    python -m sparsify.evals.gpu_cost --shape llama-3-8b --context 1024 --save cost.json

The decode step itself is run on meta tensors, which hold no values: the launches counted are the ones it makes. Bytes
are those of one token at the asked sparsity in every converted linear (realised sparsity is the realised one's
business), with keys and values of the context, and partial sums, which stay in the cache of most GPUs. Not covered: the
time of a launch, caches, quality.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals.shapes import shape_config
from sparsify.kernels import triton_backend
from sparsify.linear import SparsitySwitch, make_sparse
from sparsify.runtime import sparse_layers

SHAPES = ("llama-2-7b", "llama-3-8b")
SPARSITIES = (0.0, 0.5, 0.7)
# Operators of torch that launch nothing.
_FREE = ("view", "reshape", "detach", "split", "slice", "empty", "as_strided", "t", "transpose", "select", "alias")
_FP32 = 4


@dataclass(frozen=True)
class Cost:
    """One token of one shape.

    launches: ours by kernel, and torch's operators that launch something by name; weights: bytes of the linears of the
    blocks; rest: of the head, norms and one row of the embedding; cache: keys and values read and written; partial:
    fp32 sums written and read again.
    """

    shape: str
    sparsity: float
    batch: int
    context: int
    indexed: bool
    launches: dict[str, int]
    torch_operators: dict[str, int]
    weights: int
    rest: int
    cache: int
    partial: int

    @property
    def all_launches(self) -> int:
        return sum(self.launches.values()) + sum(self.torch_operators.values())

    @property
    def moved(self) -> int:
        """Bytes that must come from memory: all but the partial sums."""
        return self.weights + self.rest + self.cache

    def milliseconds(self, gb_per_second: float) -> float:
        """Returns the time of the moved bytes at a bandwidth: no step can be shorter."""
        return self.moved / gb_per_second / 1e6


def gpu_cost(shape: str, sparsity: float, *, context: int = 1024, batch: int = 1) -> Cost:
    """Returns what a token costs in bf16, with TEAL's thresholds at one sparsity; 0 keeps every channel.

    Raises SparsifyError for an unknown shape or a sparsity outside [0, 1), UnavailableError without Triton.
    """
    if not triton_backend.is_installed():
        raise UnavailableError("Triton is not installed: pip install triton")
    if not 0 <= sparsity < 1:
        raise SparsifyError(f"the sparsity is {sparsity}, it must be in [0, 1)")
    from sparsify.gpu_step import GpuStep
    from sparsify.kernels.gpu.launch import counted

    model = _meta_model(shape, 1.0 - sparsity)
    step = GpuStep(model, batch=batch, capacity=context + 1, run_dense=sparsity == 0)
    operators = _Operators()
    with counted() as launches, torch.inference_mode(), operators:
        step().argmax(-1)
    config: Any = model.config
    linears = sum(layer.weight.numel() for layer in sparse_layers(model).values())
    # What only some of its rows are read of.
    embedding: Any = model.get_input_embeddings()
    rest = sum(p.numel() for name, p in model.named_parameters() if "proj" not in name and p is not embedding.weight)
    if config.tie_word_embeddings:
        rest += embedding.weight.numel()
    head_size = int(step.keys[0].shape[-1])
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size
    return Cost(
        shape=shape,
        sparsity=sparsity,
        batch=batch,
        context=context,
        indexed=any(launch.kernel == "select" for launch in launches) and sparsity > 0,
        launches=dict(Counter(launch.kernel for launch in launches)),
        torch_operators=dict(operators.seen),
        weights=round(2 * linears * (1.0 - sparsity)),
        rest=2 * (rest + batch * config.hidden_size),
        cache=2 * batch * a_token * (context + 1),
        partial=2 * _FP32 * batch * _partial_sums(model, step),
    )


def table(costs: list[Cost], gb_per_second: float) -> str:
    """Returns the costs as markdown, with the time of the bytes at a bandwidth."""
    lines = [
        "| shape | sparsity | form | our launches | torch's | linears | head, rest | keys, values | "
        f"ms at {gb_per_second / 1000:.1f} TB/s | × its 0% |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        dense = next((c for c in costs if (c.shape, c.sparsity) == (cost.shape, 0.0)), None)
        limit = cost.milliseconds(gb_per_second)
        gain = f"{dense.milliseconds(gb_per_second) / limit:.2f}" if dense else ""
        lines.append(
            f"| {cost.shape} | {cost.sparsity:.0%} | {'lists' if cost.indexed else 'masks'} | "
            f"{sum(cost.launches.values())} | {sum(cost.torch_operators.values())} | {cost.weights / 1e9:.2f} GB | "
            f"{cost.rest / 1e9:.2f} GB | {cost.cache / 1e9:.2f} GB | {limit:.2f} | {gain} |"
        )
    return "\n".join(lines)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators of torch that launch something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not any(name == free or name.startswith((f"{free}_", f"_{free}")) for free in _FREE):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def _meta_model(shape: str, density: float) -> PreTrainedModel:
    """The shape on meta tensors, its blocks' linears sparse and as the GPU backend lays them out."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape_config(shape), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    switch = SparsitySwitch()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = make_sparse(module, scaled=False, rank=0, switch=switch)
            layer.backend, layer.density = triton_backend.BACKEND, density
            layer.weight.data = layer.weight.data.t().contiguous().t()
            model.set_submodule(name, layer)
    return model


def _partial_sums(model: PreTrainedModel, step: Any) -> int:
    """fp32 values that the parts of a token's products add up to."""
    from sparsify.kernels.gpu.site import multiprocessors_of
    from sparsify.kernels.gpu.tiles import tile_for

    total = 0
    whole: Any = model
    block = whole.model.layers[0]
    inner, mlp = block.self_attn, block.mlp
    sites = (
        (inner.q_proj, inner.k_proj, inner.v_proj),
        (inner.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    for linears in sites:
        outputs = [linear.out_features for linear in linears]
        tile = tile_for(
            linears[0].in_features, outputs, model.dtype, step.batch, indexed=False,
            multiprocessors=multiprocessors_of(model.device), table=step.table,
        )  # fmt: skip
        total += (tile.splits if tile.splits > 1 else 0) * sum(outputs)
    return total * int(whole.config.num_hidden_layers)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsify.evals.gpu_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", action="append", help=f"default: {', '.join(SHAPES)}")
    parser.add_argument("--sparsity", action="append", type=float)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--gb-per-second", type=float, default=4300.0, help="the GPU's bandwidth; default an H200's copy"
    )
    parser.add_argument("--save", type=Path)
    given = parser.parse_args(arguments)
    try:
        costs = [
            gpu_cost(shape, sparsity, context=given.context, batch=given.batch)
            for shape in given.shape or SHAPES
            for sparsity in given.sparsity or SPARSITIES
        ]
    except SparsifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(costs, given.gb_per_second))
    if given.save:
        document = [asdict(cost) | {"moved": cost.moved, "all_launches": cost.all_launches} for cost in costs]
        given.save.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
