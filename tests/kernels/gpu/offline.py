"""Compiles exactly what the wrappers would launch for real models, without a GPU, and prints what came out as JSON.

A program of its own: Triton's compiler and its interpreter cannot share a process. A stand-in for the driver names the
target, tensors are on meta (so that every pointer counts as aligned), and a launch compiles and stops there.
Usage: python offline.py OUT.json; the compiled files go to TRITON_CACHE_DIR.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparsify.kernels.gpu import attention, gate, gemv, mlp, norm, rows, select, site, tiles
from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.spec import SparseTensors
from sparsify.kernels.triton_backend import run

META = torch.device("meta")
# Targets, and the multiprocessors that the rule for tiles would find there: H100, A100, MI300X.
TARGETS = {
    "sm_90": (GPUTarget("cuda", 90, 32), 132),
    "sm_80": (GPUTarget("cuda", 80, 32), 108),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304),
}
KERNELS = (
    gemv.sparse_gemv, select.select, norm.add_norm, attention.decode_attention, rows.relu_rows, gate.gate_product,
)  # fmt: skip
# hidden size, neurons, key heads of 128 beside 32 query heads
LLAMA_3_8B, LLAMA_2_7B = (4096, 14336, 8), (4096, 11008, 32)
# Of fp16, what differs from bf16: the type of the products.
IN_FP16 = {"q|k|v 1 indexed", "mlp 1 masked", "mlp 8 masked", "attention"}
_SOURCES = Path(gemv.__file__).parent


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return META


class Launches:
    """Takes the place of every launch: compiles it and keeps what came out."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[int, ...], Any]] = []
        compile_only = JITFunction.run
        made = self.made

        def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = compile_only(self, *args, grid=grid, warmup=True, **options)
            made.append((self.__name__, grid, kernel))
            return kernel

        JITFunction.run = launch

    def taken(self) -> list[tuple[str, tuple[int, ...], Any]]:
        found = list(self.made)
        self.made.clear()
        return found


class Shapes:
    """Tensors without data, of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=META)

    def linear(
        self, outputs: int, inputs: int, *, rank: int = 0, rsparse: bool = False, by_rows: bool = False,
        density: float | None = None,
    ) -> SparseTensors:  # fmt: skip
        """rsparse: with a scale, a bias and low-rank rows."""
        weight = self.tensor(outputs, inputs) if by_rows else self.tensor(inputs, outputs).t()
        return SparseTensors(
            weight,
            self.tensor(outputs) if rsparse else None,
            self.tensor(dtype=torch.float32),
            self.tensor(inputs, dtype=torch.float32) if rsparse else None,
            self.tensor(rank, inputs) if rank else None,
            self.tensor(rank, outputs).t() if rank else None,
            density,
        )


def cases(dtype: torch.dtype, model: tuple[int, int, int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of what a decode step of a model launches, and calls that launch it."""
    hidden, neurons, key_heads = model
    s, scratch = Shapes(dtype), Scratch(META)
    for tokens in (1, 8):
        x = s.tensor(tokens, hidden)
        for form, density in (("masked", None), ("indexed", 0.1)):
            qkv = [s.linear(n, hidden, density=density) for n in (hidden, key_heads * 128, key_heads * 128)]
            pair = [s.linear(neurons, hidden, density=density) for _ in range(2)]
            down = s.linear(hidden, neurons, density=density)
            yield f"q|k|v {tokens} {form}", lambda x=x, qkv=qkv: run(x, qkv)
            yield f"mlp {tokens} {form}", lambda x=x, mlps=(*pair, down): mlp.gated_mlp(x, *mlps, activation="silu")
        three = [s.linear(n, hidden, rank=64, rsparse=True) for n in (hidden, key_heads * 128, key_heads * 128)]
        yield f"rsparse q|k|v {tokens} masked", lambda x=x, three=three: run(x, three)
    x = s.tensor(1, hidden)
    yield "norm", lambda: norm.run_norm(x, x, s.tensor(hidden), 1e-5, scratch=scratch)
    listed = [s.linear(8, hidden) for _ in range(3)]
    yield "norm and lists", lambda: norm.run_norm(x, x, s.tensor(hidden), 1e-5, scratch=scratch, select_for=listed)
    yield "gate product", lambda: gate.run_gate(s.tensor(1, neurons), s.tensor(1, neurons), "silu", scratch=scratch)
    up, down = s.linear(neurons, hidden, by_rows=True), s.linear(hidden, neurons)
    yield "relu mlp", lambda: mlp.gated_mlp(x, s.linear(neurons, hidden), up, down, activation="relu")
    yield "attention", lambda: _attention(s, key_heads, window=None, normed=False, scratch=scratch)
    yield "attention, norms and a window", lambda: _attention(s, key_heads, window=1024, normed=True, scratch=scratch)


def _attention(s: Shapes, key_heads: int, *, window: int | None, normed: bool, scratch: Scratch) -> None:
    caches, angles = s.tensor(1, key_heads, 4096, 128), s.tensor(4096, 128)
    q, k = s.tensor(1, 32 * 128), s.tensor(1, key_heads * 128)
    attention.run_attention(
        q, k, k, caches, caches, angles, angles, s.tensor(dtype=torch.int64), scaling=0.1, window=window,
        scratch=scratch, q_weight=s.tensor(128) if normed else None, k_weight=s.tensor(128) if normed else None,
        epsilon=1e-6,
    )  # fmt: skip


def facts(kernel: Any) -> dict[str, Any]:
    """Registers, memory and instructions of one compiled kernel."""
    if "ptx" in kernel.asm:
        return {"shared": kernel.metadata.shared, **_resources(kernel.asm["cubin"]), **_nvidia(kernel.asm["ptx"])}
    text = kernel.asm["amdgcn"]
    number = {name: int(re.search(rf"\.{name}: +(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
    return {"registers": number["vgpr_count"], "spilled": number["vgpr_spill_count"], **_amd(text)}


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def _nvidia(ptx: str) -> dict[str, Any]:
    loads: Counter[str] = Counter()
    for source, line in _by_source(ptx):
        if found := re.search(r"cp\.async\.c[ag]\.shared\.global .*?, 0x([0-9a-f]+)", line):
            loads[f"{source} | async {int(found[1], 16)}"] += 1
        elif found := re.search(r"ld\.global(\.cg)?\S*?(?:\.v(\d))?\.b(\d+) ", line):
            loads[f"{source} | {'cg ' if found[1] else ''}{int(found[2] or 1) * int(found[3]) // 8}"] += 1
    return {
        "loads": loads,
        "atomics": re.findall(r"\b(?:atom|red)\.\S+", ptx),
        "products": sorted(set(re.findall(r"\b(?:mma\.sync|wgmma)\S+|\bfma\.\S+", ptx))),
    }


def _amd(text: str) -> dict[str, Any]:
    loads: Counter[str] = Counter()
    size = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short_d16": 2, "short_d16_hi": 2}
    for source, line in _by_source(text):
        if found := re.search(r"\b(?:global|buffer)_load_(\w+)", line):
            loads[f"{source} | {size.get(found[1], found[1])}"] += 1
    return {
        "loads": loads,
        "atomics": re.findall(r"\b(?:global|buffer|flat)_atomic_\w+", text),
        "products": sorted(set(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mfma|mac|dot\d)\w+", text))),
    }


def _by_source(text: str) -> Iterator[tuple[str, str]]:
    """Every line of assembly with the line of Python that it came from."""
    source = ""
    for line in text.splitlines():
        if found := re.search(r"\.loc\s.*?(?://|;) (\w+\.py):(\d+)", line):
            file = _SOURCES / found[1]
            source = file.read_text().splitlines()[int(found[2]) - 1].strip() if file.is_file() else ""
        else:
            yield source, line


def main(out: str) -> None:
    launches, found = Launches(), []
    for name, (target, multiprocessors) in TARGETS.items():
        driver.set_active(Driver(target))
        site._MULTIPROCESSORS = multiprocessors
        tiles.table_of.cache_clear()
        for kernel in KERNELS:
            kernel.device_caches.clear()
        for dtype, model in ((torch.bfloat16, LLAMA_3_8B), (torch.float16, LLAMA_2_7B)):
            for case, call in cases(dtype, model):
                if dtype == torch.float16 and case not in IN_FP16:
                    continue
                call()
                for kernel, grid, compiled in launches.taken():
                    found.append(
                        {"target": name, "dtype": str(dtype).removeprefix("torch."), "case": case, "kernel": kernel}
                        | {"programs": grid, **facts(compiled)}
                    )
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
