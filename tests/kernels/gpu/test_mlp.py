"""The gated MLP in two launches, and its ReLU form, against the modules' formula."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from sparsify.kernels.gpu.gate import run_gate
from sparsify.kernels.gpu.mlp import gated_mlp
from sparsify.kernels.gpu.scratch import Scratch, scratch_of
from sparsify.kernels.gpu.site import ACTIVATIONS
from sparsify.kernels.reference import sparse_linear
from sparsify.kernels.spec import SparseTensors

Make = Callable[..., SparseTensors]
Mlp = tuple[SparseTensors, SparseTensors, SparseTensors]

EVERY_ACTIVATION = pytest.mark.parametrize(
    ("activation", "dtype"), [*((name, torch.float32) for name in ACTIVATIONS), ("silu", torch.bfloat16)], ids=str
)


@pytest.fixture
def mlp(linear: Make) -> Callable[..., Mlp]:
    """Makes gate, up and down of sums near 1, so that the activations are used where they bend."""

    def make(
        inputs: int, neurons: int, outputs: int, rank: int = 0, *, rows: bool = False,
        thresholds: tuple[float, float, float] = (0.3, 0.4, 0.3), **options: object,
    ) -> Mlp:  # fmt: skip
        shapes = ((neurons, inputs), (neurons, inputs), (outputs, neurons))
        ranks = (rank, 0 if rows else rank, rank)
        gate, up, down = (
            linear(*shape, r, threshold=threshold, **options)
            for shape, r, threshold in zip(shapes, ranks, thresholds, strict=True)
        )
        for t in (gate, up, down):
            t.weight.mul_(t.weight.shape[1] ** -0.5)
            if t.lr_a is not None:
                t.lr_a.mul_(t.lr_a.shape[1] ** -0.5)
        return gate, replace(up, weight=up.weight.contiguous()) if rows else up, down

    return make


def expected(x: Tensor, gate: SparseTensors, up: SparseTensors, down: SparseTensors, name: str, cut: float) -> Tensor:
    g = sparse_linear(x, gate)
    act = torch.where(g.float() <= cut, 0.0, g) if name == "relu" else ACT2FN[name](g)
    return sparse_linear(act * sparse_linear(x, up), down)


def assert_near(found: Tensor, right: Tensor) -> None:
    """To the sum of a few roundings; a value near the cut of down may fall to its other side, in a half dtype."""
    tolerance = {torch.float32: 3e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}[found.dtype]
    assert found.dtype == right.dtype
    assert found.shape == right.shape
    assert float((found - right).norm()) <= tolerance * float(right.norm())


@pytest.fixture(autouse=True)
def _counters_are_zero_afterwards(device: torch.device) -> object:
    yield
    assert not scratch_of(device)._ring.any()


@EVERY_ACTIVATION
def test_equals_the_modules(activation: str, dtype: torch.dtype, mlp: Callable[..., Mlp], device: torch.device) -> None:
    x = torch.randn(1, 40).to(device, dtype)
    tensors = mlp(40, 130, 33, dtype=dtype)
    assert_near(gated_mlp(x, *tensors, activation=activation), expected(x, *tensors, activation, 0.0))


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("density", [None, 0.1], ids=["masked", "indexed"])
def test_several_tokens_with_low_rank(
    density: float | None, tokens: int, mlp: Callable[..., Mlp], device: torch.device
) -> None:
    x = torch.randn(tokens, 40).to(device)
    tensors = mlp(40, 130, 33, 3, density=density)
    assert_near(gated_mlp(x, *tensors, activation="silu"), expected(x, *tensors, "silu", 0.0))


@pytest.mark.parametrize("rows", [False, True], ids=["up by channels", "up by rows"])
@pytest.mark.parametrize("cut", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_relu(dtype: torch.dtype, cut: float, rows: bool, mlp: Callable[..., Mlp], device: torch.device) -> None:
    x = torch.randn(1, 40).to(device, dtype)
    tensors = mlp(40, 130, 33, rows=rows, dtype=dtype, thresholds=(0.3, 0.4, 0.0))
    assert_near(gated_mlp(x, *tensors, activation="relu", cut=cut), expected(x, *tensors, "relu", cut))


@pytest.mark.parametrize("rows", [False, True], ids=["up by channels", "up by rows"])
def test_the_cut_is_not_rounded(rows: bool, mlp: Callable[..., Mlp], device: torch.device) -> None:
    """A gate of bf16(0.3), 0.30078125, is above a cut of 0.3."""
    dtype = torch.bfloat16
    gate, up, down = mlp(40, 130, 33, rows=rows, dtype=dtype, scaled=False, thresholds=(-1.0, -1.0, 0.0))
    for t in (gate, up):
        t.weight.zero_()
    gate.bias.fill_(0.3)
    up.bias.fill_(1.0)
    down.bias.zero_()
    x = torch.ones(1, 40).to(device, dtype)
    assert gated_mlp(x, gate, up, down, activation="relu", cut=0.3).any()
    assert not gated_mlp(x, gate, up, down, activation="relu", cut=0.301).any()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("rows", [False, True], ids=["up by channels", "up by rows"])
def test_relu_with_a_threshold_of_down(rows: bool, rank: int, mlp: Callable[..., Mlp], device: torch.device) -> None:
    """Neurons that are on and below it are dropped by down, or go through its low-rank rows."""
    x = torch.randn(1, 40).to(device)
    gate, up, down = mlp(40, 130, 33, rank, rows=rows, thresholds=(0.3, 0.4, 0.5))
    right = expected(x, gate, up, down, "relu", 0.0)
    assert_near(gated_mlp(x, gate, up, down, activation="relu"), right)


def test_rows_of_neurons_that_are_off_are_not_read(mlp: Callable[..., Mlp], device: torch.device) -> None:
    x = torch.randn(1, 40).to(device)
    gate, up, down = mlp(40, 130, 33, rows=True, thresholds=(0.3, 0.4, 0.0))
    right = gated_mlp(x, gate, up, down, activation="relu", cut=0.1)
    off = sparse_linear(x, gate)[0] <= 0.1
    assert off.any()
    assert not off.all()
    up.weight[off] = math.nan
    down.weight[:, off] = math.nan
    assert torch.equal(gated_mlp(x, gate, up, down, activation="relu", cut=0.1), right)


def test_no_neuron_is_on(mlp: Callable[..., Mlp], device: torch.device) -> None:
    """Down's bias is what remains."""
    for rows in (False, True):
        tensors = mlp(40, 130, 33, rows=rows, thresholds=(0.3, 0.4, 0.0))
        y = gated_mlp(torch.randn(1, 40).to(device), *tensors, activation="relu", cut=1e9)
        assert torch.equal(y, tensors[2].bias[None])


@pytest.mark.parametrize("tokens", [2, 8])
def test_relu_of_several_tokens(tokens: int, mlp: Callable[..., Mlp], device: torch.device) -> None:
    x = torch.randn(tokens, 40).to(device)
    tensors = mlp(40, 130, 33, thresholds=(0.3, 0.4, 0.0))
    for cut in (0.0, 0.3):
        assert_near(gated_mlp(x, *tensors, activation="relu", cut=cut), expected(x, *tensors, "relu", cut))


def test_a_nan_reaches_the_output(mlp: Callable[..., Mlp], device: torch.device) -> None:
    x = torch.randn(1, 40).to(device)
    x[0, 7] = math.nan
    for activation, rows in itertools.product(("silu", "relu"), (False, True)):
        if activation == "relu" or not rows:
            assert gated_mlp(x, *mlp(40, 130, 33, rows=rows), activation=activation).isnan().all()


def test_leading_dimensions_and_odd_linears(mlp: Callable[..., Mlp], device: torch.device) -> None:
    """A bias on up only: gate and up take a launch each."""
    gate, up, down = mlp(40, 130, 33)
    gate = replace(gate, bias=None)
    for lead in ((), (2, 3), (1, 1)):
        x = torch.randn(*lead, 40).to(device)
        assert_near(gated_mlp(x, gate, up, down, activation="silu"), expected(x, gate, up, down, "silu", 0.0))


def test_one_of_each(mlp: Callable[..., Mlp], device: torch.device) -> None:
    for rows in (False, True):
        tensors = mlp(1, 1, 1, rows=rows, thresholds=(-1.0, -1.0, -1.0))
        x = torch.ones(1, 1, device=device)
        assert_near(gated_mlp(x, *tensors, activation="relu"), expected(x, *tensors, "relu", 0.0))


@EVERY_ACTIVATION
def test_the_product_by_itself(
    activation: str, dtype: torch.dtype, scratch: Scratch, device: torch.device, rounding: Callable[..., float]
) -> None:
    """For a dense down: more than one block of it, and a last one that is not full; parts of wider rows."""
    gate, up = torch.randn(3, 2, 1300).to(device, dtype).unbind(1)
    found = run_gate(gate, up, activation, scratch=scratch)
    right = ACT2FN[activation](gate.double()) * up.double()
    assert found.is_contiguous()
    allowed = 2.1 * rounding(dtype) * right.abs() + 4 * 2**-23 * (gate * up).double().abs()
    assert ((found.double() - right).abs() <= allowed).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [False, True], ids=["up by channels", "up by rows"])
def test_in_a_graph_the_input_changes(rows: bool, mlp: Callable[..., Mlp], device: torch.device) -> None:
    tensors = mlp(512, 1500, 300, rows=rows, thresholds=(0.3, 0.4, 0.0))
    x = torch.randn(1, 512).to(device)
    gated_mlp(x, *tensors, activation="relu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gated_mlp(x, *tensors, activation="relu")
    for _ in range(3):
        x.copy_(torch.randn(1, 512))
        graph.replay()
        assert torch.equal(found, gated_mlp(x, *tensors, activation="relu"))
        assert_near(found, expected(x, *tensors, "relu", 0.0))
