"""The backend as layers call it: dispatch, any input, many tokens, gradients, torch.compile, CUDA graphs."""

import dataclasses
import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsify.kernels import dispatch, triton_backend
from sparsify.kernels.gpu.scratch import scratch_of
from sparsify.kernels.gpu.site import on_device
from sparsify.kernels.layout import channel_contiguous
from sparsify.kernels.reference import sparse_linear
from sparsify.kernels.spec import SparseTensors
from sparsify.kernels.triton_backend import BACKEND, run, triton_linear
from sparsify.linear import SparseLinear, SparsitySwitch

Make = Callable[..., SparseTensors]
Error = Callable[[Tensor, Tensor, SparseTensors], float]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CUDA = torch.device("cuda")


def layer_of(t: SparseTensors) -> SparseLinear:
    """A layer with these tensors, run by the backend."""
    outputs, inputs = t.weight.shape
    layer = SparseLinear(
        inputs, outputs, t.bias is not None, scaled=t.scale is not None, rank=0 if t.lr_a is None else len(t.lr_a),
        switch=SparsitySwitch(), device=t.weight.device, dtype=t.weight.dtype,
    )  # fmt: skip
    layer.backend = BACKEND
    layer.requires_grad_(False)
    layer.weight.data = t.weight
    for name in ("bias", "threshold", "scale", "lr_a", "lr_b"):
        if (value := getattr(t, name)) is not None:
            setattr(layer, name, torch.nn.Parameter(value, requires_grad=False) if name == "bias" else value)
    return layer


def assert_near(found: Tensor, expected: Tensor) -> None:
    """To a few roundings of the dtype, relative to the largest output."""
    step = max(torch.finfo(found.dtype).eps, 1e-6)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found.double() - expected.double()).abs().max()) <= 4 * step * float(expected.abs().max() + 1)


# ---- dispatch ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_preferred_on_a_gpu_and_never_on_a_cpu(dtype: torch.dtype) -> None:
    assert dispatch.preferred_backend(CUDA, dtype, 64, 64) is BACKEND
    assert dispatch.preferred_backend(torch.device("cuda", 1), dtype, 64, 64) is BACKEND
    for device in (torch.device("cpu"), torch.device("meta")):
        assert dispatch.preferred_backend(device, dtype, 64, 64) is not BACKEND


def test_other_dtypes_are_the_references() -> None:
    assert dispatch.preferred_backend(CUDA, torch.float64, 64, 64).name == "reference"
    assert BACKEND.missing(CUDA, torch.float64) is None


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(triton_backend, "is_installed", lambda: False)
    dispatch._warn_once.cache_clear()
    chosen = [dispatch.select_backend(CUDA, torch.bfloat16, 64, 64).name for _ in range(3)]
    dispatch._warn_once.cache_clear()
    assert chosen == ["reference"] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "pip install triton" in record.getMessage()
    assert BACKEND.missing(torch.device("cpu"), torch.bfloat16) is None


def test_with_triton_nothing_is_missing() -> None:
    assert triton_backend.is_installed()
    assert BACKEND.missing(CUDA, torch.bfloat16) is None


# ---- values ----


def test_a_layer_runs_by_it(linear: Make, error: Error, device: torch.device) -> None:
    dtype = torch.bfloat16
    t = linear(70, 100, 4, dtype=dtype)
    layer = layer_of(t)
    for tokens in (1, 3):
        x = torch.randn(tokens, 100).to(device, dtype)
        assert error(layer(x), x, t) <= 1
    layer.switch.forced_dense = True
    x = torch.randn(1, 100).to(device, dtype)
    everything = SparseTensors(t.weight, t.bias, torch.tensor(-1.0, device=device))
    assert error(layer(x), x, everything) <= 1


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("rank", [0, 4])
def test_many_tokens(rank: int, tokens: int, linear: Make, device: torch.device) -> None:
    for dtype in DTYPES:
        x = torch.randn(tokens, 100).to(device, dtype)
        site = [linear(70, 100, rank, dtype=dtype), linear(3, 100, dtype=dtype, bias=False, scaled=False)]
        for y, t in zip(run(x, site), site, strict=True):
            assert_near(y, sparse_linear(x, t))


@pytest.mark.parametrize("lead", [(), (1,), (8,), (2, 3), (2, 1, 4), (3, 3), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions(lead: tuple[int, ...], linear: Make, device: torch.device) -> None:
    t = linear(33, 40, 2)
    x = torch.randn(*lead, 40).to(device)
    (y,) = run(x, [t])
    assert y.shape == (*lead, 33)
    torch.testing.assert_close(y, sparse_linear(x, t), rtol=1e-5, atol=2e-5)


def test_sites_of_any_number_of_linears(linear: Make, error: Error, device: torch.device) -> None:
    """Unlike neighbours, and more than share a launch."""
    x = torch.randn(2, 40).to(device)
    site = [
        linear(5 + k, 40, (0, 2)[k % 2], bias=k != 1, scaled=k < 3, threshold=0.2 * k, density=0.1 if k == 4 else None)
        for k in range(5)
    ]
    found = run(x, site)
    assert [y.shape[1] for y in found] == [5, 6, 7, 8, 9]
    assert all(error(y, x, t) <= 1 for y, t in zip(found, site, strict=True))
    assert run(x, []) == []


def test_inputs_in_any_strides(linear: Make, device: torch.device) -> None:
    t = linear(33, 13)
    wide = torch.randn(26, 8).to(device)
    for x in (
        wide[:13].t(), wide.view(8, 26)[:, ::2], wide.view(8, 26)[::3, 5:18], wide[0, :1].expand(4, 13),
        wide.view(-1)[1:14], wide.view(4, 2, 26)[..., :13].transpose(0, 1),
    ):  # fmt: skip
        copy = x.clone(memory_format=torch.contiguous_format)
        assert torch.equal(run(x, [t])[0], run(copy, [t])[0])


def test_inputs_that_are_a_negative_view(linear: Make, device: torch.device) -> None:
    """torch can hold -x as x and a mark."""
    x, t = torch.randn(3, 13).to(device), linear(9, 13, 2)
    for rows in (x, x[:1], x.repeat(5, 1)):
        assert torch.equal(run(torch._neg_view(rows), [t])[0], run(-rows, [t])[0])


def test_weights_as_the_layout_makes_them(linear: Make, error: Error, device: torch.device) -> None:
    t = linear(33, 40)
    laid = dataclasses.replace(t, weight=channel_contiguous(t.weight.contiguous()))
    x = torch.randn(1, 40).to(device)
    assert error(run(x, [laid])[0], x, t) <= 1


def test_the_current_device_is_left_alone(device: torch.device) -> None:
    before = torch.cuda.current_device() if device.type == "cuda" else None
    with on_device(device):
        pass
    assert before == (torch.cuda.current_device() if device.type == "cuda" else None)


# ---- gradients, torch.compile ----


def parts(t: SparseTensors) -> list[Tensor]:
    """The tensors that are trained."""
    return [part for part in (t.weight, t.bias, t.lr_a, t.lr_b) if part is not None]


@pytest.mark.parametrize("lead", [(), (3,), (2, 6), (0,)], ids=str)
@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_equal_the_references(rank: int, lead: tuple[int, ...], linear: Make, device: torch.device) -> None:
    t = linear(17, 31, rank)
    x = torch.randn(*lead, 31).to(device).requires_grad_()
    trained = [x, *(part.requires_grad_() for part in parts(t))]
    (y,), expected = run(x, [t]), sparse_linear(x, t)
    by = torch.randn(*lead, 17).to(device)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5)
    found, right = torch.autograd.grad(y, trained, by), torch.autograd.grad(expected, trained, by)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_no_gradient_where_none_is_asked(linear: Make, device: torch.device) -> None:
    x, t = torch.randn(3, 31).to(device).requires_grad_(), linear(17, 31, 4)
    with torch.no_grad():
        assert not run(x, [t])[0].requires_grad
    with torch.inference_mode():
        assert run(torch.randn(3, 31).to(device), [t])[0].is_inference()
    assert not run(x.detach(), [t])[0].requires_grad


@pytest.mark.parametrize("rank", [0, 3])
def test_is_a_proper_torch_operator(rank: int, linear: Make, device: torch.device) -> None:
    t = linear(9, 13, rank)
    for part in parts(t):
        part.requires_grad_()
    x = torch.randn(2, 13).to(device).requires_grad_()
    arguments = (x, t.weight, t.bias, t.threshold, t.scale, t.lr_a, t.lr_b)
    outcome = torch.library.opcheck(triton_linear, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_compiles_into_one_graph(trained: bool, linear: Make, device: torch.device) -> None:
    site = [linear(9, 13, 3), linear(4, 13)]
    x = torch.randn(5, 13).to(device).requires_grad_(trained)

    def function(x: Tensor) -> Tensor:
        first, second = run(x * 2, site)
        return first.sum(-1) + second.relu().sum(-1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x), rtol=1e-5, atol=2e-5)
    if trained:
        (found,), (right,) = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, function))
        torch.testing.assert_close(found, right, rtol=1e-5, atol=2e-5)


# ---- on a GPU only ----


@pytest.mark.gpu
def test_compiles_by_inductor(linear: Make, device: torch.device) -> None:
    layer = layer_of(linear(300, 512, 4, dtype=torch.bfloat16))
    x = torch.randn(1, 512).to(device, torch.bfloat16)
    compiled = torch.compile(lambda x: layer(x.relu()) * 2, fullgraph=True)
    for _ in range(2):
        assert_near(compiled(x), layer(x.relu()) * 2)
        x.copy_(torch.randn(1, 512))


@pytest.mark.gpu
@pytest.mark.parametrize("density", [None, 0.1], ids=["masked", "indexed"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_graph_follows_inputs_and_thresholds(
    tokens: int, density: float | None, linear: Make, error: Error, device: torch.device
) -> None:
    """Captured once: which channels are kept is known on the device alone, at every replay."""
    x = torch.randn(tokens, 1024).to(device, torch.bfloat16)
    site = [linear(n, 1024, 8, dtype=x.dtype, density=density) for n in (1024, 300, 256)]
    run(x, site)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x, site)
    for threshold in (0.6, -1.0, 2.5, math.inf):
        x.copy_(torch.randn(tokens, 1024))
        for k, t in enumerate(site):
            t.threshold.fill_(threshold + 0.1 * k)
        for _ in range(2):
            graph.replay()
            assert all(error(y, x, t) <= 1 for y, t in zip(found, site, strict=True)), threshold
    assert not scratch_of(device)._ring.any()


@pytest.mark.gpu
def test_runs_on_a_device_that_is_not_the_current_one(linear: Make, error: Error) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    t = linear(33, 40)
    moved = SparseTensors(
        *(None if part is None else part.to(other) for part in (t.weight, t.bias, t.threshold, t.scale))
    )
    x = torch.randn(1, 40).to(other)
    assert error(run(x, [moved])[0], x, moved) <= 1
