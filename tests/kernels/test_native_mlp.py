"""The gated MLP in one call against the modules' formula, rounded where modules round, for every instruction set."""

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.kernels import library
from sparsify.kernels.native import run
from sparsify.kernels.native_mlp import gated_mlp
from sparsify.kernels.reference import keep_mask
from sparsify.kernels.spec import SparseTensors

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

ISAS = library.isas(loaded) if (loaded := library.load()) is not None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [inputs, neurons, outputs]
SHAPES = [(1, 1, 1), (5, 7, 3), (13, 40, 33), (37, 96, 45), (64, 301, 130)]
# Steeper than any of the activations is.
SLOPE = 1.13


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set of this machine."""
    loaded = library.load()
    before = loaded.sp_isa_in_use().decode()
    library.use_isa(loaded, request.param)
    yield request.param
    library.use_isa(loaded, before)


@contextmanager
def using(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For the references: waking a second thread for numbers this small takes longer than the test."""
    with using(1):
        yield


def tensors(
    outputs: int,
    inputs: int,
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    threshold: float = -1.0,
    rows: bool = False,
    bias: bool = True,
    scaled: bool = True,
) -> SparseTensors:
    """Of sums near 1, so that the activations are used where they bend."""
    weight = (torch.randn(outputs, inputs) / math.sqrt(inputs)).to(dtype)
    return SparseTensors(
        weight=weight if rows else weight.t().contiguous().t(),
        bias=torch.randn(outputs).to(dtype) if bias else None,
        threshold=torch.tensor(threshold),
        scale=torch.rand(inputs) + 0.5 if scaled else None,
        lr_a=torch.randn(rank, inputs).to(dtype) if rank else None,
        lr_b=torch.randn(rank, outputs).to(dtype).t() if rank else None,
    )


def mlp(
    shape: tuple[int, int, int], rank: int = 0, *, rows: bool = False, **options: object
) -> tuple[SparseTensors, SparseTensors, SparseTensors]:
    """gate, up and down; rows: up's weights are row-major."""
    inputs, neurons, outputs = shape
    gate, up = (tensors(neurons, inputs, rank, rows=by_rows, **options) for by_rows in (False, rows))
    return gate, up, tensors(outputs, neurons, rank, **options)


def linear(x: Tensor, t: SparseTensors) -> tuple[Tensor, Tensor]:
    """One linear in fp64 and the error that a kernel may make: fp32 sums, and a rounding that falls the other way."""
    keep, wide = keep_mask(x, t.threshold, t.scale), x.double()
    terms = [(torch.where(keep, wide, 0.0), t.weight.double().t())]
    if t.lr_a is not None and t.lr_b is not None:
        terms.append((torch.where(keep, 0.0, wide), t.lr_a.double().t() @ t.lr_b.double().t()))
    bias = torch.zeros((), dtype=torch.float64) if t.bias is None else t.bias.double()
    y = bias + sum(values @ weights for values, weights in terms)
    size = bias.abs() + sum(values.abs() @ weights.abs() for values, weights in terms)
    rounding = torch.finfo(x.dtype).eps * y.abs() if x.dtype != torch.float32 else 0.0
    return y, torch.finfo(torch.float32).eps * (2 + math.sqrt(x.shape[-1])) * size + rounding


def between(values: Tensor, share: float) -> float:
    """A cut of which a share of values is below, in the widest gap near it: no rounding moves a value across."""
    ordered = values.double().flatten().sort().values
    if len(ordered) < 8:
        return float(ordered[-1]) * 2 + 1 if share > 0.5 else -1.0
    first = int(len(ordered) * (share - 0.1))
    near = ordered[first : first + max(2, len(ordered) // 5)]
    at = int(near.diff().argmax())
    return float(near[at] + near[at + 1]) / 2


def product(x: Tensor, gate: SparseTensors, up: SparseTensors, activation: str, cut: float) -> tuple[Tensor, Tensor]:
    """act(gate x) · up x as modules round it, and the error of a kernel, by the slopes of the formula."""
    dtype = x.dtype
    (g, g_error), (u, u_error) = linear(x, gate), linear(x, up)
    rounded = g.to(dtype)
    a = ACT2FN[activation](rounded)
    if cut:
        a = torch.where(rounded.float() <= cut, 0.0, rounded)
    eps = torch.finfo(dtype).eps
    # The activation's own error is relative to its input: gelu takes its smallest results off numbers near 1.
    a_error = SLOPE * g_error + eps * a.double().abs() + 2 * torch.finfo(torch.float32).eps * g.abs()
    p = a * u.to(dtype)
    return p, (a_error + SLOPE * eps) * u.abs() + a.double().abs() * u_error + eps * p.double().abs()


def error(found: Tensor, p: Tensor, p_error: Tensor, down: SparseTensors) -> float:
    """The largest error over what is allowed: at most 1 is right.

    Allowed: what a linear may, and the errors of the products, which are independent and add up as the root of their
    squares, three times over.
    """
    expected, own = linear(p, down)
    eps = torch.finfo(found.dtype).eps
    through = (
        torch.where(keep_mask(p, down.threshold, down.scale), p_error, 0.0).square() @ down.weight.double().t().square()
    )
    if down.lr_a is not None and down.lr_b is not None:
        through = through + p_error.square() @ (down.lr_b.double() @ down.lr_a.double()).t().square()
    wrong = (found.double() - expected).abs() / (eps * expected.abs() + own + 3 * through.sqrt() + eps**2)
    return float(wrong.max()) if not wrong.isnan().any() else math.inf


# ---- values ----


@pytest.mark.parametrize("activation", library.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_modules_formula(isa: str, dtype: torch.dtype, activation: str) -> None:
    choose = random.Random(0)
    for shape, rank, tokens in itertools.product(SHAPES, (0, 2), range(1, 9)):
        rows, bias, scaled, sparse = (choose.random() < 0.5 for _ in range(4))
        threads, share = choose.choice((1, 2, 3)), choose.choice((0.5, 0.85))
        x = torch.randn(tokens, shape[0]).to(dtype)
        gate, up, down = mlp(shape, rank, dtype=dtype, rows=rows, bias=bias, scaled=scaled)
        if sparse:
            gate, up = (replace(t, threshold=x.float().abs().quantile(share)) for t in (gate, up))
        cut = between(linear(x, gate)[0], share) if activation == "relu" and choose.random() < 0.5 else 0.0
        p, p_error = product(x, gate, up, activation, cut)
        if sparse:
            score = p.float().abs() * (1.0 if down.scale is None else down.scale)
            down = replace(down, threshold=torch.tensor(between(score, share)))
        with using(threads):
            y = gated_mlp(x, gate, up, down, activation=activation, cut=cut)
        assert y.dtype == dtype
        case = (shape, rank, tokens, rows, bias, scaled, sparse, threads, share, cut)
        assert error(y, p, p_error, down) <= 1, case


@pytest.mark.parametrize("activation", library.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_over_their_range(isa: str, dtype: torch.dtype, activation: str) -> None:
    """Gate, up and down are such that y is act(x): every bf16 or fp16 number, and as many of fp32."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = x.view(dtype) if dtype != torch.float32 else torch.cat([torch.linspace(-110, 110, 2**15), x.float() / 2**12])
    x = torch.where(x.isfinite(), x, 0.0)
    none, one = torch.tensor(math.inf), torch.ones(1, dtype=dtype)
    up = SparseTensors(torch.zeros(256, 1, dtype=dtype), torch.ones(256, dtype=dtype), none)
    identity = SparseTensors(torch.eye(256).to(dtype), None, torch.tensor(-1.0))
    # 256 neurons at a time, each to an output of its own.
    gates = [SparseTensors(up.weight, part, none) for part in x.split(256)]
    y = torch.cat([gated_mlp(one, gate, up, identity, activation=activation) for gate in gates]).double()
    x = x.double()
    expected, info = ACT2FN[activation](x), torch.finfo(dtype)
    # One rounding, and the formula in fp32: gelu takes its smallest results off numbers near 1.
    allowed = info.eps / 2 * expected.abs() + info.tiny * info.eps / 2 + 2 * torch.finfo(torch.float32).eps * x.abs()
    wrong = (y - expected).abs() / allowed
    assert float(wrong.max()) <= 1, float(x[wrong.argmax()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_bits_for_the_same_threads(isa: str, dtype: torch.dtype) -> None:
    """And in one thread for the same token among others. One token of relu and a row-major up takes its own way."""
    for rows, rank, (activation, cut) in itertools.product((False, True), (0, 2), (("silu", 0.0), ("relu", 0.4))):
        x = torch.randn(8, 37).to(dtype)
        parts = mlp((37, 301, 130), rank, dtype=dtype, rows=rows, threshold=0.3)
        results: dict[int, Tensor] = {}
        for threads in (1, 2, 3, 1, 2, 3):
            with using(threads):
                together = gated_mlp(x, *parts, activation=activation, cut=cut)
                alone = torch.cat([gated_mlp(row, *parts, activation=activation, cut=cut)[None] for row in x])
            assert torch.equal(results.setdefault(threads, together), together), (rows, rank, activation, threads)
            assert torch.equal(results.setdefault(-threads, alone), alone), (rows, rank, activation, threads)
            assert threads > 1 or torch.equal(alone, together), (rows, rank, activation)


@pytest.mark.parametrize("cut", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipped_rows_give_the_same_as_all_rows(isa: str, dtype: torch.dtype, cut: float) -> None:
    for tokens, sparse, threads in itertools.product((1, 3), (False, True), (1, 2)):
        x = torch.randn(tokens, 37).to(dtype)
        gate, up, down = mlp((37, 301, 45), dtype=dtype, rows=True, threshold=0.3 if sparse else -1.0)
        # The cut must not be where a sum in another order falls to its other side.
        at = between(linear(x, gate)[0], 0.6 + cut / 2)
        p, p_error = product(x, gate, up, "relu", at)
        down = replace(down, threshold=torch.tensor(-1.0))
        with using(threads):
            y = gated_mlp(x, gate, up, down, activation="relu", cut=at)
        assert error(y, p, p_error, down) <= 1, (tokens, sparse, threads)


def test_rows_of_inactive_neurons_are_not_read(isa: str) -> None:
    """Up's rows are NaN where the gate is closed: the product form would make everything NaN."""
    gate, up, down = mlp((37, 96, 45), rows=True)
    closed = torch.arange(96) % 3 == 0
    gate.bias[closed] = -100.0
    x = torch.randn(1, 37)
    expected = gated_mlp(x, gate, up, down, activation="relu")
    up.weight[closed] = math.nan
    assert torch.equal(gated_mlp(x, gate, up, down, activation="relu"), expected)
    assert gated_mlp(x.expand(2, 37), gate, up, down, activation="relu").isnan().all()


@pytest.mark.parametrize("rows", [False, True], ids=["up by channels", "up by rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_neuron_is_active(isa: str, dtype: torch.dtype, rows: bool) -> None:
    gate, up, down = mlp((37, 96, 45), dtype=dtype, rows=rows)
    gate.bias.fill_(-1000.0)
    for tokens, threads in itertools.product((1, 2, 8), (1, 2)):
        x = torch.randn(tokens, 37).to(dtype)
        with using(threads):
            assert torch.equal(gated_mlp(x, gate, up, down, activation="relu"), down.bias.expand(tokens, 45))
            without = replace(down, bias=None)
            assert not gated_mlp(x, gate, up, without, activation="relu", cut=3.0).any()


@pytest.mark.parametrize("rows", [False, True], ids=["up by channels", "up by rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_neurons_are_active(isa: str, dtype: torch.dtype, rows: bool) -> None:
    """relu is then the identity: the product of two linears and a third one."""
    gate, up, down = mlp((37, 96, 45), dtype=dtype, rows=rows)
    gate.bias.fill_(50.0)
    for tokens in (1, 8):
        x = torch.randn(tokens, 37).to(dtype)
        (g, u) = run(x, [gate, up])
        assert bool((g > 0).all())
        assert torch.equal(gated_mlp(x, gate, up, down, activation="relu"), run(g * u, [down])[0])


@pytest.mark.parametrize("activation", library.ACTIVATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(isa: str, bad: float, activation: str) -> None:
    for dtype, tokens, rows in itertools.product(DTYPES, (1, 3), (False, True)):
        gate, up, down = mlp((37, 96, 45), dtype=dtype, rows=rows, threshold=0.3)
        x = torch.randn(tokens, 37).to(dtype)
        x[tokens // 2, 5] = bad
        p, _ = product(x, gate, up, activation, 0.0)
        expected = linear(p, down)[0]
        y = gated_mlp(x, gate, up, down, activation=activation)
        case = (dtype, tokens, rows)
        assert torch.equal(y.isnan(), expected.isnan()), case
        assert torch.equal(y.isinf(), expected.isinf()), case
        assert not y[tokens // 2].isfinite().any(), case


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (1, 8)], ids=str)
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    parts = mlp((13, 40, 33))
    x = torch.randn(*lead, 26)[..., ::2]
    y = gated_mlp(x, *parts, activation="silu")
    assert y.shape == (*lead, 33)
    assert torch.equal(y.view(-1, 33), gated_mlp(x.reshape(-1, 13), *parts, activation="silu"))


# ---- errors ----


def test_unknown_activation() -> None:
    with pytest.raises(SparsifyError, match=r"unknown activation 'sillu'.*Did you mean 'silu'\?"):
        gated_mlp(torch.randn(1, 5), *mlp((5, 7, 3)), activation="sillu")


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_cut_is_for_relu(activation: str) -> None:
    with pytest.raises(SparsifyError, match=rf"cut of 0\.1 is for relu \(FATReLU\), not for {activation}"):
        gated_mlp(torch.randn(1, 5), *mlp((5, 7, 3)), activation=activation, cut=0.1)


@pytest.mark.parametrize("tokens", [0, 9])
def test_number_of_tokens(tokens: int) -> None:
    with pytest.raises(SparsifyError, match=f"1 to 8 tokens, not {tokens}"):
        gated_mlp(torch.randn(tokens, 5), *mlp((5, 7, 3)), activation="silu")


def test_sizes_that_do_not_fit_together() -> None:
    gate, up, down = mlp((5, 7, 3))
    with pytest.raises(SparsifyError, match="gate has 7 neurons, up has 8"):
        gated_mlp(torch.randn(1, 5), gate, tensors(8, 5), down, activation="silu")
    with pytest.raises(SparsifyError, match=r"7 channels.*\[3, 6\]"):
        gated_mlp(torch.randn(1, 5), gate, up, tensors(3, 6), activation="silu")
    with pytest.raises(SparsifyError, match=r"5 channels.*\[7, 4\]"):
        gated_mlp(torch.randn(1, 5), gate, tensors(7, 4), down, activation="silu")
    with pytest.raises(SparsifyError, match=r"6 channels.*\[7, 5\]"):
        gated_mlp(torch.randn(1, 6), gate, up, down, activation="silu")


@pytest.mark.parametrize(
    "x",
    [torch.tensor(1.0), torch.empty(2, 0), torch.empty(2, 5, device="meta"), torch.ones(2, 5, dtype=torch.float64)],
    ids=["no dimension", "no channel", "on meta", "fp64"],
)  # fmt: skip
def test_inputs_that_it_cannot_take(x: Tensor) -> None:
    with pytest.raises(SparsifyError):
        gated_mlp(x, *mlp((5, 7, 3)), activation="silu")


@pytest.mark.parametrize("which", range(4), ids=["x", "gate", "up", "down"])
def test_a_gradient_is_refused_not_dropped(which: int) -> None:
    x, parts = torch.randn(1, 5), mlp((5, 7, 3))
    [x, *(part.weight for part in parts)][which].requires_grad_()
    with pytest.raises(SparsifyError, match="no gradients"):
        gated_mlp(x, *parts, activation="silu")
    with torch.no_grad():
        assert not gated_mlp(x, *parts, activation="silu").requires_grad


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "missing", lambda: "it is not built")
    with pytest.raises(UnavailableError, match="it is not built"):
        gated_mlp(torch.randn(1, 5), *mlp((5, 7, 3)), activation="silu")
