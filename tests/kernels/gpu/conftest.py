"""What the tests of the Triton kernels share. They run on the GPU where there is one, else in Triton's interpreter."""

import importlib.util
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sparsify.kernels.reference import keep_mask
from sparsify.kernels.spec import SparseTensors

if importlib.util.find_spec("triton") is None:
    # They import it where they are collected.
    collect_ignore_glob = ["test_*.py"]

MakeLinear = Callable[..., SparseTensors]
Rounding = Callable[[torch.dtype], float]


@pytest.fixture
def scratch(device: torch.device) -> Iterator[object]:
    """Work memory of the test's own; after the test, every counter must be zero again."""
    from sparsify.kernels.gpu.scratch import Scratch

    scratch = Scratch(device, size=512)
    yield scratch
    assert not scratch._ring.any()


@pytest.fixture(scope="session")
def rounding(device: torch.device) -> Rounding:
    """How far one rounding to a dtype may be off, relative: half a step; the interpreter truncates to bf16."""
    return lambda dtype: torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 and device.type == "cpu" else 0.5)


@pytest.fixture
def linear(device: torch.device) -> MakeLinear:
    """Makes the tensors of a random linear [outputs, inputs], channel-contiguous."""

    def make(
        outputs: int,
        inputs: int,
        rank: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        threshold: float = 0.6,
        bias: bool = True,
        scaled: bool = True,
        density: float | None = None,
    ) -> SparseTensors:
        return SparseTensors(
            weight=torch.randn(inputs, outputs).to(device, dtype).t(),
            bias=torch.randn(outputs).to(device, dtype) if bias else None,
            threshold=torch.tensor(threshold, device=device),
            scale=(torch.rand(inputs) + 0.5).to(device) if scaled else None,
            lr_a=torch.randn(rank, inputs).to(device, dtype) if rank else None,
            lr_b=torch.randn(rank, outputs).to(device, dtype).t() if rank else None,
            density=density,
        )

    return make


@pytest.fixture(scope="session")
def error(rounding: Rounding) -> Callable[[Tensor, Tensor, SparseTensors], float]:
    """Returns the largest error of y [T, O] for x [T, I] over what is allowed: at most 1 is right.

    Allowed: one rounding of the output, the rounding errors of fp32 sums, which grow as the root of their length, and
    for several tokens in half precision the rounding of t to two numbers of that dtype.
    """

    def measure(found: Tensor, x: Tensor, t: SparseTensors) -> float:
        expected, size, low_size = exact(x, t)
        info = torch.finfo(found.dtype)
        length = x.shape[-1] + (0 if t.lr_a is None else len(t.lr_a))
        allowed = rounding(found.dtype) * expected.abs() + info.tiny * info.eps
        # Tensor cores keep fewer digits in a sum than a chain of fp32 additions.
        allowed += 2 * torch.finfo(torch.float32).eps * (2 + math.sqrt(length)) * size
        if len(x) > 1 and found.dtype != torch.float32:
            allowed += info.eps**2 / 4 * low_size
        wrong = (found.double() - expected).abs() / allowed
        return float(wrong.max()) if not wrong.isnan().any() else math.inf

    return measure


def exact(x: Tensor, t: SparseTensors) -> tuple[Tensor, Tensor, Tensor]:
    """y in fp64, the sum of its terms' magnitudes, and that of its low-rank terms."""
    keep = keep_mask(x, t.threshold, t.scale)
    kept, rest, weight = torch.where(keep, x.double(), 0.0), torch.where(keep, 0.0, x.double()), t.weight.double()
    y, size = kept @ weight.t(), kept.abs() @ weight.abs().t()
    low_size = torch.zeros_like(size)
    if t.bias is not None:
        y, size = y + t.bias.double(), size + t.bias.double().abs()
    if t.lr_a is not None and t.lr_b is not None:
        a, b = t.lr_a.double(), t.lr_b.double()
        low_size = rest.abs() @ a.abs().t() @ b.abs().t()
        y = y + rest @ a.t() @ b.t()
    return y, size + low_size, low_size
