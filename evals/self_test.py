"""Self-tests: whether every kernel of every backend computes the right thing on this machine, against fp64.

A kernel's cases are one generator in this file and one entry in _KERNELS. A backend with several instruction sets is
tested with each that the machine has. Not covered: speed, and models as a whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.kernels import dispatch, library, native, native_mlp, triton_backend
from sparsify.kernels.spec import Backend, SparseTensors

# Norm of the error over the norm of the exact output. One rounding of the output is 2^-9 in bf16 and 2^-12 in fp16
# on average; the low-rank branch rounds twice more and the sum once.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_SHAPES = ((64, 64), (33, 129), (160, 96), (512, 256))
# Every number of tokens that one native call takes, two calls' worth, and the path of many tokens.
_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 96)
_DENSITIES = (0.0, 0.1, 0.5, 1.0)
_RANKS = (0, 8)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class SelfTest:
    """The self-test of one kernel of one backend on one device in one dtype: its cases and the worst of them."""

    backend: str
    isa: str | None
    kernel: str
    device: str
    dtype: str
    cases: int
    worst_error: float
    tolerance: float
    problem: str | None

    @property
    def passed(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class Case:
    """One call of a kernel, and the fp64 output that it must come near to."""

    where: str
    run: Callable[[], Tensor]
    expected: Tensor


def run_self_tests() -> list[SelfTest]:
    """Runs every kernel of every backend with every instruction set, device and dtype that it supports."""
    devices = [torch.device(name) for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))]
    tests: list[SelfTest] = []
    for backend in dispatch.backends():
        for kernel, cases_of in _KERNELS.items():
            for device in devices:
                for dtype in _TOLERANCES:
                    if cases := list(cases_of(backend, device, dtype)):
                        tests += _test(backend, kernel, device, dtype, cases)
    return tests


def _test(
    backend: Backend, kernel: str, device: torch.device, dtype: torch.dtype, cases: list[Case]
) -> Iterator[SelfTest]:
    short, tolerance = str(dtype).removeprefix("torch."), _TOLERANCES[dtype]
    for isa in _instruction_sets(backend):
        with _instruction_set(isa):
            worst, problem = _worst(cases, tolerance)
        yield SelfTest(backend.name, isa, kernel, device.type, short, len(cases), worst, tolerance, problem)


def _worst(cases: list[Case], tolerance: float) -> tuple[float, str | None]:
    """Returns the worst error of the cases, and what was wrong with the first that is wrong."""
    worst, problem = 0.0, None
    for case in cases:
        try:
            error = float((case.run().double() - case.expected).norm() / case.expected.norm())
        # A kernel can fail in any way, and the table names it.
        except Exception as raised:  # noqa: BLE001
            problem = problem or f"{case.where}: {type(raised).__name__}: {' '.join(str(raised).split())}"
            continue
        worst = max(worst, error)
        if not error <= tolerance:
            problem = problem or f"{case.where}: error {error:.1e}"
    return worst, problem


def _instruction_sets(backend: Backend) -> list[str | None]:
    loaded = library.load() if backend is native.BACKEND else None
    return [None] if loaded is None else list(library.isas(loaded))


@contextmanager
def _instruction_set(name: str | None) -> Iterator[None]:
    loaded = library.load()
    if name is None or loaded is None:
        yield
        return
    before = loaded.sp_isa_in_use().decode()
    library.use_isa(loaded, name)
    try:
        yield
    finally:
        library.use_isa(loaded, before)


def _linear_cases(backend: Backend, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The sparse linear, over shapes, numbers of tokens, densities and ranks."""
    for outputs, inputs in _SHAPES:
        if not backend.supports(device, dtype, inputs, outputs):
            continue
        for tokens in _TOKENS:
            random = torch.Generator().manual_seed(outputs * inputs + tokens)
            x = _normal(random, tokens, inputs).to(device, dtype)
            for density in _DENSITIES:
                for rank in _RANKS:
                    tensors = _random_linear(random, x, outputs, density, rank, backend.channel_contiguous)
                    where = f"[{outputs}, {inputs}], {tokens} tokens, density {density}, rank {rank}"
                    yield Case(where, partial(_run_linear, backend, x, tensors), exact(x, tensors))


def _mlp_cases(backend: Backend, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The gated MLP in one call, which the native and the GPU backend have; for relu also with up by rows.

    Down drops what is exactly 0 and nothing else: its mask must not hang on how gate and up were rounded.
    """
    inputs, neurons = 96, 160
    gated_mlp = _gated_mlp(backend)
    if gated_mlp is None or not backend.supports(device, dtype, inputs, neurons):
        return
    for activation, function in _ACTIVATIONS.items():
        for by_rows in (False, True) if activation == "relu" else (False,):
            # On a GPU several tokens have no use for rows of up.
            most = 1 if by_rows and device.type == "cuda" else library.MAX_TOKENS
            for tokens in range(1, most + 1):
                random = torch.Generator().manual_seed(tokens)
                x = _normal(random, tokens, inputs).to(device, dtype)
                gate = _random_linear(random, x, neurons, 0.5, 8, True)
                up = _random_linear(random, x, neurons, 0.5, 0, not by_rows)
                inner = function(exact(x, gate)) * exact(x, up)
                down = _random_linear(random, inner.to(dtype), inputs, 1.0, 0, True)
                down.threshold.zero_()
                where = f"{activation}{', up by rows' if by_rows else ''}, {tokens} tokens"
                yield Case(where, partial(gated_mlp, x, gate, up, down, activation=activation), exact(inner, down))


def _gated_mlp(backend: Backend) -> Callable[..., Tensor] | None:
    if backend is triton_backend.BACKEND and triton_backend.is_installed():
        from sparsify.kernels.gpu import mlp

        return mlp.gated_mlp
    return native_mlp.gated_mlp if backend is native.BACKEND else None


# The kernels by name, each with its cases for a backend, device and dtype: none where the backend has no such kernel.
_KERNELS: dict[str, Callable[[Backend, torch.device, torch.dtype], Iterator[Case]]] = {
    "linear": _linear_cases,
    "mlp": _mlp_cases,
}


def _run_linear(backend: Backend, x: Tensor, tensors: SparseTensors) -> Tensor:
    return backend.run(x, (tensors,))[0]


def _normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random)


def _random_linear(
    random: torch.Generator, x: Tensor, outputs: int, density: float, rank: int, channel_contiguous: bool
) -> SparseTensors:
    """Returns a linear on x's device and in its dtype that keeps this share of x [B, I]."""
    inputs, like = x.shape[1], partial(torch.Tensor.to, device=x.device, dtype=x.dtype)
    weight, bias = like(_normal(random, outputs, inputs)), like(_normal(random, outputs))
    scale = torch.rand(inputs, generator=random).add(0.5).to(x.device)
    scores = (x.float().abs() * scale).flatten()
    threshold = torch.tensor(-1.0, device=x.device) if density == 1 else scores.quantile(1 - density)
    if channel_contiguous:
        weight = weight.t().contiguous().t()
    if not rank:
        return SparseTensors(weight, bias, threshold.float(), scale)
    lr_a, lr_b = like(_normal(random, rank, inputs) / inputs**0.5), like(_normal(random, outputs, rank))
    if channel_contiguous:
        lr_b = lr_b.t().contiguous().t()
    return SparseTensors(weight, bias, threshold.float(), scale, lr_a, lr_b)


def exact(x: Tensor, t: SparseTensors) -> Tensor:
    """Returns y [B, O] = W (x ⊙ keep) + B A (x ⊙ ¬keep) + b in fp64; the mask is compared in fp32, as specified."""
    keep = ~(x.float().abs() * (1.0 if t.scale is None else t.scale) <= t.threshold)
    x64 = x.double()
    y = torch.where(keep, x64, 0.0) @ t.weight.double().t()
    if t.lr_a is not None and t.lr_b is not None:
        y = y + torch.where(keep, 0.0, x64) @ t.lr_a.double().t() @ t.lr_b.double().t()
    return y if t.bias is None else y + t.bias.double()
