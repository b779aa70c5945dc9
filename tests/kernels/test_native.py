"""The native CPU backend against the equation in fp64, for every instruction set, dtype, layout and bad value."""

import ctypes
import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sparsify.kernels import library, native
from sparsify.kernels.reference import keep_mask, sparse_linear
from sparsify.kernels.spec import SparseTensors

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

ISAS = library.isas(loaded) if (loaded := library.load()) is not None else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]

# [outputs, inputs].
SHAPES = [(1, 1), (1, 13), (7, 1), (3, 5), (17, 31), (33, 8), (130, 70)]
# 9 is a second group of 8; 40 and 130 are products by BLAS, of bf16 and of all dtypes.
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 40, 130]
# The last has more columns than a tile of 8192 is wide; with 8 tokens a tile is 1024 wide.
LARGE_SHAPES = [(257, 129), (1101, 40), (8201, 24)]
LAYOUTS = ["channels", "channels of a wider buffer", "rows", "rows of a wider buffer"]
# The share of channels that are dropped; -1 keeps zeros too.
DROPPED = {"all kept": -1.0, "most kept": 0.2, "few kept": 0.9, "none kept": math.inf}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set of this machine."""
    loaded = library.load()
    before = loaded.sp_isa_in_use().decode()
    library.use_isa(loaded, request.param)
    yield request.param
    library.use_isa(loaded, before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For the references: waking a second thread for numbers this small takes longer than the test."""
    with using(1):
        yield


@contextmanager
def using(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """The same weight in other strides; a wider buffer is NaN around it."""
    turned = weight.t() if layout.startswith("channels") else weight
    if "wider" in layout:
        wide = torch.full((turned.shape[0], turned.shape[1] + 5), math.nan, dtype=weight.dtype)
        wide[:, 2:-3] = turned
        turned = wide[:, 2:-3]
    else:
        turned = turned.contiguous()
    return turned.t() if layout.startswith("channels") else turned


def tensors(
    outputs: int,
    inputs: int,
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    threshold: float = 0.6,
    layout: str = "channels",
    bias: bool = True,
    scaled: bool = True,
) -> SparseTensors:
    return SparseTensors(
        weight=laid_out(torch.randn(outputs, inputs).to(dtype), layout),
        bias=torch.randn(outputs).to(dtype) if bias else None,
        threshold=torch.tensor(threshold),
        scale=torch.rand(inputs) + 0.5 if scaled else None,
        lr_a=torch.randn(rank, inputs).to(dtype) if rank else None,
        lr_b=torch.randn(rank, outputs).to(dtype).t() if rank else None,
    )


def smallest(dtype: torch.dtype) -> float:
    """The smallest number above 0, a subnormal one."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def cut(x: Tensor, dropped: float) -> float:
    """The threshold at which a share of the channels of x is dropped."""
    return dropped if not 0 < dropped < 1 else float(x.float().abs().quantile(dropped))


def exact(x: Tensor, t: SparseTensors) -> tuple[Tensor, Tensor]:
    """y in fp64, and the sum of its terms' magnitudes, which is what rounding errors are in proportion to."""
    keep = keep_mask(x, t.threshold, t.scale)
    kept, rest, weight = torch.where(keep, x.double(), 0.0), torch.where(keep, 0.0, x.double()), t.weight.double()
    y, size = kept @ weight.t(), kept.abs() @ weight.abs().t()
    if t.bias is not None:
        y, size = y + t.bias.double(), size + t.bias.double().abs()
    if t.lr_a is not None and t.lr_b is not None:
        a, b = t.lr_a.double(), t.lr_b.double()
        y, size = y + rest @ a.t() @ b.t(), size + rest.abs() @ a.abs().t() @ b.abs().t()
    return y, size


def error(found: Tensor, x: Tensor, t: SparseTensors) -> float:
    """The largest error over what is allowed: at most 1 is right.

    Allowed: the one rounding of the output, eps/2 of it or half the smallest number, and the rounding errors of fp32
    sums, which grow as the root of their length. Products by BLAS are rounded to dtype, then added: three roundings
    more, each eps/2 of a sum of terms.
    """
    expected, size = exact(x, t)
    info, length = torch.finfo(found.dtype), x.shape[-1] + (0 if t.lr_a is None else len(t.lr_a))
    allowed = info.eps / 2 * expected.abs() + smallest(found.dtype) / 2
    allowed += torch.finfo(torch.float32).eps * (2 + math.sqrt(length)) * size
    if x.shape[:-1].numel() > library.MAX_TOKENS:
        allowed += 3 * info.eps / 2 * size
    wrong = (found.double() - expected).abs() / allowed
    return float(wrong.max()) if not wrong.isnan().any() else math.inf


def assert_right(x: Tensor, t: SparseTensors, case: object = None) -> None:
    (found,) = native.run(x, (t,))
    assert found.dtype == x.dtype
    assert found.shape == (*x.shape[:-1], t.weight.shape[0])
    assert error(found, x, t) <= 1, case


# ---- values ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_equation(isa: str, dtype: torch.dtype) -> None:
    choose = random.Random(0)
    large = itertools.product(LARGE_SHAPES, (0, 8), (1, 3, 8))
    for shape, rank, tokens in itertools.chain(itertools.product(SHAPES, (0, 1, 8), TOKENS), large):
        dropped, layout = choose.choice(list(DROPPED)), choose.choice(LAYOUTS)
        bias, scaled, threads = choose.random() < 0.5, choose.random() < 0.5, choose.choice((1, 2, 3))
        x = torch.randn(tokens, shape[1]).to(dtype)
        threshold = cut(x, DROPPED[dropped])
        t = tensors(*shape, rank, dtype=dtype, threshold=threshold, layout=layout, bias=bias, scaled=scaled)
        with using(threads):
            (found,) = native.run(x, (t,))
        assert error(found, x, t) <= 1, (shape, rank, tokens, dropped, layout, bias, scaled, threads)


@pytest.mark.parametrize("dropped", DROPPED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_density_in_every_layout(isa: str, layout: str, dropped: str) -> None:
    for dtype, rank, tokens in itertools.product(DTYPES, (0, 3), (1, 5)):
        x = torch.randn(tokens, 70).to(dtype)
        t = tensors(130, 70, rank, dtype=dtype, threshold=cut(x, DROPPED[dropped]), layout=layout)
        assert_right(x, t, (dtype, rank, tokens))


@pytest.mark.parametrize("has_product", [False, True], ids=["widened to fp32", "in the dtype"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_by_blas(layout: str, has_product: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of it, whichever the processor has; 600 inputs are more than one block that is widened at once."""
    monkeypatch.setattr(native, "_has_product", lambda dtype: has_product)
    for dtype, rank in itertools.product(DTYPES, (0, 3)):
        x = torch.randn(96, 600).to(dtype)
        assert_right(x, tensors(37, 600, rank, dtype=dtype, layout=layout), (dtype, rank))


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("tokens", [1, 8, 130])
def test_a_site_of_several_linears(isa: str, tokens: int, count: int) -> None:
    """Thresholds, sizes, ranks and layouts differ; 9 are more than one call of the library takes."""
    for dtype, threads in itertools.product(DTYPES, (1, 2)):
        x = torch.randn(tokens, 45).to(dtype)
        site = [
            tensors(
                (64, 7, 1, 200)[k % 4], 45, (0, 2, 5)[k % 3], dtype=dtype, threshold=0.3 * k - 0.3,
                layout=LAYOUTS[k % 4], bias=k % 2 == 0, scaled=k % 3 == 0,
            )
            for k in range(count)
        ]  # fmt: skip
        with using(threads):
            found = native.run(x, site)
        assert len(found) == count
        for k, (y, t) in enumerate(zip(found, site, strict=True)):
            assert error(y, x, t) <= 1, (dtype, threads, k)


@pytest.mark.parametrize("lead", [(), (1,), (8,), (2, 3), (2, 1, 4), (5, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_leading_dimensions(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    assert_right(torch.randn(*lead, 13).to(dtype), tensors(9, 13, 2, dtype=dtype))


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens(lead: tuple[int, ...]) -> None:
    (y,) = native.run(torch.empty(*lead, 13), [tensors(9, 13, 2)])
    assert y.shape == (*lead, 9)


def test_inputs_in_any_strides() -> None:
    t = tensors(9, 13, 2)
    wide = torch.randn(26, 8)
    for x in (
        wide[::2].t(), wide[:13].t(), wide.view(8, 26)[:, ::2], wide.view(8, 26)[::3, 5:18],
        torch.randn(13).expand(4, 13), torch.randn(4, 1).expand(4, 13), torch.randn(4, 2, 13).transpose(0, 1),
    ):  # fmt: skip
        assert torch.equal(native.run(x, [t])[0], native.run(x.clone(memory_format=torch.contiguous_format), [t])[0])
        assert_right(x, t)


def test_inputs_that_are_a_negative_view() -> None:
    """torch can hold -x as x and a mark."""
    x, t = torch.randn(3, 13), tensors(9, 13, 2)
    assert torch.equal(native.run(torch._neg_view(x), [t])[0], native.run(-x, [t])[0])


# ---- the mask ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_is_the_references(isa: str, dtype: torch.dtype) -> None:
    """Of an identity, y is x where it is kept: every channel's threshold is on, just under and just over its score."""
    inputs = 77
    identity = torch.eye(inputs).to(dtype)
    x = torch.randn(8, inputs).to(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, smallest(dtype)])
    for scale in (None, torch.rand(inputs) + 0.5):
        score = x[0].float().abs() * (1.0 if scale is None else scale)
        down, up = torch.tensor(-math.inf), torch.tensor(math.inf)
        for threshold in torch.cat([score, score.nextafter(down), score.nextafter(up), torch.tensor([0.0, -1.0])]):
            t = SparseTensors(identity, None, threshold, scale)
            keep = keep_mask(x, threshold, scale)
            for tokens in (1, 8):
                (y,) = native.run(x[:tokens], [t])
                assert torch.equal(y, torch.where(keep, x, 0.0)[:tokens]), (threshold, tokens)


@pytest.mark.parametrize("layout", ["channels", "rows"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(isa: str, bad: float, layout: str) -> None:
    """They are kept whatever the threshold, except an infinite one, and reach the output as in the reference."""
    for dtype, rank, tokens, threshold in itertools.product(DTYPES, (0, 2), (1, 4, 130), (-1.0, 0.6, math.inf)):
        t = tensors(33, 21, rank, dtype=dtype, threshold=threshold, layout=layout)
        t.weight[5, 20] = 0.0
        for channel in (0, 20):
            x = torch.randn(tokens, 21).to(dtype)
            x[tokens // 2, channel] = bad
            case = (dtype, rank, tokens, threshold, channel)
            (found,), expected = native.run(x, [t]), sparse_linear(x, t)
            assert torch.equal(found.isnan(), expected.isnan()), case
            assert torch.equal(found.isposinf(), expected.isposinf()), case
            assert torch.equal(found.isneginf(), expected.isneginf()), case
            assert math.isinf(threshold) or not found[tokens // 2, :5].isfinite().any(), case


def test_a_nan_is_kept_by_every_threshold(isa: str) -> None:
    for tokens, position in itertools.product((1, 8), (0, 18)):
        x = torch.zeros(tokens, 19)
        x[:, position] = math.nan
        assert native.run(x, [tensors(5, 19, threshold=math.inf)])[0].isnan().all()


def test_nan_in_a_scale_keeps_its_channel(isa: str) -> None:
    t = SparseTensors(torch.eye(19), None, torch.tensor(9.0), torch.tensor([*[1.0] * 18, math.nan]))
    for tokens in (1, 3):
        (y,) = native.run(torch.ones(tokens, 19), [t])
        assert torch.equal(y, torch.eye(19)[18].expand(tokens, 19))


def test_the_sign_of_zero_does_not_matter(isa: str) -> None:
    for dtype, threshold in itertools.product(DTYPES, (-1.0, 0.0)):
        t = tensors(33, 21, 2, dtype=dtype, threshold=threshold)
        x = torch.randn(2, 21).to(dtype)
        x[:, ::3] = 0.0
        minus = x.clone()
        minus[:, ::3] = -0.0
        assert torch.equal(native.run(x, [t])[0], native.run(minus, [t])[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_numbers(isa: str, dtype: torch.dtype) -> None:
    """Of x, of the weights and of the outputs: none is flushed to zero. fp32 sums of them are exact; 0.25 rounds."""
    tiny = smallest(dtype)
    x = torch.tensor([[tiny, -3 * tiny, 5 * tiny] * 7], dtype=torch.float64).to(dtype)
    for factor in (1.0, 4.0) if dtype == torch.float32 else (1.0, 0.25):
        weight = torch.full((37, 21), factor).to(dtype)
        assert_right(x, SparseTensors(weight.t().contiguous().t(), None, torch.tensor(0.0)), factor)
        small = torch.full((37, 21), tiny, dtype=torch.float64).to(dtype)
        assert_right(torch.full((1, 21), factor).to(dtype), SparseTensors(small, None, torch.tensor(0.0)), factor)


# ---- conversions ----


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65536 numbers of a dtype."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def bits(values: Tensor) -> Tensor:
    """Bit patterns, one for all NaNs: a signalling one may become quiet."""
    return values.view(torch.int16).masked_fill(values.isnan(), 0x7FFF)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_round_trips_as_a_bias(isa: str, dtype: torch.dtype) -> None:
    every = patterns(dtype)
    weight = laid_out(torch.zeros(2**16, 2, dtype=dtype), "channels")
    for tokens in (1, 3):
        x = torch.ones(tokens, 2, dtype=dtype)
        for y in native.run(x, [SparseTensors(weight, every, torch.tensor(math.inf))])[0]:
            # Added to sums of 0, -0.0 is 0.0.
            assert torch.equal(bits(y), bits(every + 0.0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ["channels", "rows"])
def test_every_number_round_trips_as_a_weight(isa: str, layout: str, dtype: torch.dtype) -> None:
    every = patterns(dtype)
    for start in (0, 3):
        weight = laid_out(torch.stack([every[start:], torch.zeros_like(every[start:])], 1), layout)
        for tokens in (1, 4):
            x = torch.tensor([[1.0, 0.0]] * tokens).to(dtype)
            for y in native.run(x, [SparseTensors(weight, None, torch.tensor(0.0))])[0]:
                # Added to 0, -0.0 is 0.0.
                assert torch.equal(bits(y), bits(every[start:] + 0.0))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_finite_number_round_trips_inside_a_row(isa: str, dtype: torch.dtype) -> None:
    """Rows of 65, so that vectors and what is left after them both convert; x picks one column a token."""
    every = patterns(dtype)
    finite = torch.where(every.isfinite(), every, 0.0)
    weight = torch.cat([finite, torch.zeros(65 * 1009 - 2**16, dtype=dtype)]).view(1009, 65)
    t = SparseTensors(weight, None, torch.tensor(0.0))
    picked = torch.cat([native.run(part, [t])[0] for part in torch.eye(65).to(dtype).split(8)])
    assert torch.equal(picked.t(), weight)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_finite_number_round_trips_as_an_input(isa: str, dtype: torch.dtype) -> None:
    every = patterns(dtype)
    x = torch.where(every.isfinite(), every, 0.0).view(-1, 64)
    t = SparseTensors(torch.eye(64).to(dtype), None, torch.tensor(-1.0))
    for part in x.split(8):
        assert torch.equal(native.run(part, [t])[0], part)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_outputs_are_rounded_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """Of every number and its neighbour, sums under, on and over the middle; torch rounds them in software."""
    bit = torch.arange(2**15 - 1).to(torch.int16)
    below, above = bit.view(dtype), (bit + 1).view(dtype)
    between = above.isfinite()
    below, gap = below[between], (above[between].float() - below[between].float()).to(dtype)
    t = SparseTensors(torch.stack([below, gap], 1).t().contiguous().t(), None, torch.tensor(0.0))
    for part in (0.25, 0.49609375, 0.5, 0.50390625, 0.75):
        for sign in (1.0, -1.0):
            x = torch.tensor([sign, sign * part]).to(dtype)
            (y,) = native.run(x, [t])
            assert torch.equal(y, (below.float() * x[0].float() + gap.float() * x[1].float()).to(dtype)), part


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_outputs_overflow_to_infinity_from_the_middle_on(isa: str, dtype: torch.dtype) -> None:
    most, eps = torch.finfo(dtype).max, torch.finfo(dtype).eps
    # The gap below the largest number.
    gap = 2.0 ** math.floor(math.log2(most)) * eps
    weight = torch.tensor([[most, gap]] * 37, dtype=torch.float64).to(dtype)
    for part, expected in ((0.49609375, most), (0.5, math.inf), (1.0, math.inf)):
        (y,) = native.run(torch.tensor([1.0, part]).to(dtype), [SparseTensors(weight, None, torch.tensor(0.0))])
        assert (y.double() == expected).all()


# ---- memory and threads ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_bits_for_the_same_threads(isa: str, dtype: torch.dtype) -> None:
    """Another number of threads adds up in another order: a rounding of the sum or of the output."""
    for shape, rank, tokens, layout in itertools.product([(1, 13), (33, 8), (257, 129)], (0, 8), (1, 3, 8), LAYOUTS):
        x = torch.randn(tokens, shape[1]).to(dtype)
        site = [tensors(*shape, rank, dtype=dtype, layout=layout) for _ in range(2)]
        results: dict[int, Tensor] = {}
        for threads in (1, 2, 3, 1, 2, 3):
            with using(threads):
                found = torch.stack(native.run(x, site))
            assert torch.equal(results.setdefault(threads, found), found), (shape, rank, tokens, layout, threads)
            assert_near(found, results[1])


def assert_near(found: Tensor, expected: Tensor) -> None:
    """The same but for the order of fp32 sums: a step of the dtype, relative to the largest output."""
    step = max(torch.finfo(found.dtype).eps, 1e-5)
    assert float((found.double() - expected.double()).abs().max()) <= 2 * step * float(expected.double().abs().max())


@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("layout", ["channels", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_all_outputs_and_nothing_beside(isa: str, dtype: torch.dtype, layout: str, tokens: int) -> None:
    """Through the library itself, between guards; and counts what the tokens keep."""
    x, t, guard = torch.randn(tokens, 70).to(dtype), tensors(130, 70, 3, dtype=dtype, layout=layout), 64
    expected = native.run(x, [t])[0]
    kept = torch.tensor(5)
    linear = native.checked(dtype, 70, t, kept)
    for threads in (1, 2, 3):
        y = torch.full((guard + tokens * 130 + guard,), math.nan).to(dtype)
        pointer = (ctypes.c_void_p * 1)(y.data_ptr() + guard * y.element_size())
        status = library.load().sp_site(
            library.DTYPES[dtype], x.data_ptr(), 70, tokens, ctypes.byref(linear), 1, pointer, threads
        )
        assert status == 0
        assert_near(y[guard:-guard].view(tokens, 130), expected)
        assert y[:guard].isnan().all()
        assert y[-guard:].isnan().all()
    assert int(kept) == 5 + 3 * int(keep_mask(x, t.threshold, t.scale).sum())


def test_work_memory_of_an_earlier_call_does_not_show(isa: str) -> None:
    for threads, tokens in itertools.product((1, 2), (1, 5)):
        with using(threads):
            native.run(torch.full((8, 129), math.nan), [tensors(257, 129, 8) for _ in range(3)])
            for layout in LAYOUTS:
                assert_right(torch.randn(tokens, 31), tensors(17, 31, 4, layout=layout), (threads, tokens, layout))


# ---- gradients, torch.compile ----


def parts(t: SparseTensors) -> list[Tensor]:
    """The tensors that are trained."""
    return [part for part in (t.weight, t.bias, t.lr_a, t.lr_b) if part is not None]


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 4), (130,), (0,)], ids=str)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("layout", ["channels", "rows"])
def test_gradients_equal_the_references(layout: str, rank: int, lead: tuple[int, ...]) -> None:
    for bias, scaled in itertools.product((False, True), (False, True)):
        t = tensors(17, 31, rank, layout=layout, bias=bias, scaled=scaled)
        x = torch.randn(*lead, 31, requires_grad=True)
        trained = [x, *(part.requires_grad_() for part in parts(t))]
        (y,), expected = native.run(x, [t]), sparse_linear(x, t)
        by = torch.randn(*lead, 17)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        found, right = torch.autograd.grad(y, trained, by), torch.autograd.grad(expected, trained, by)
        for one, other in zip(found, right, strict=True):
            # Sums of up to 130 products of numbers near 1, in another order.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("which", range(5), ids=["x", "weight", "bias", "A", "B"])
def test_gradients_of_one_tensor_alone(which: int) -> None:
    x, t = torch.randn(3, 31), tensors(17, 31, 4)
    one = [x, *parts(t)][which].requires_grad_()
    native.run(x, [t])[0].square().sum().backward()
    found, one.grad = one.grad, None
    sparse_linear(x, t).square().sum().backward()
    torch.testing.assert_close(found, one.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_in_half_precision_are_near(dtype: torch.dtype) -> None:
    x, t = torch.randn(3, 31).to(dtype).requires_grad_(), tensors(17, 31, 4, dtype=dtype)
    trained = [x, *(part.requires_grad_() for part in parts(t))]
    by = torch.randn(3, 17).to(dtype)
    found = torch.autograd.grad(native.run(x, [t])[0], trained, by)
    right = torch.autograd.grad(sparse_linear(x, t), trained, by)
    for one, other in zip(found, right, strict=True):
        assert one.dtype == dtype
        # Two products in a row, each rounded.
        bound = 4 * torch.finfo(dtype).eps * float(other.abs().max())
        assert float((one.float() - other.float()).abs().max()) <= bound


def test_no_gradient_where_none_is_asked() -> None:
    x, t = torch.randn(3, 31, requires_grad=True), tensors(17, 31, 4)
    with torch.no_grad():
        assert not native.run(x, [t])[0].requires_grad
    with torch.inference_mode():
        assert native.run(torch.randn(3, 31), [t])[0].is_inference()
    assert not native.run(x.detach(), [t])[0].requires_grad


@pytest.mark.parametrize("rank", [0, 3])
def test_is_a_proper_torch_operator(rank: int) -> None:
    t = tensors(9, 13, rank)
    for part in parts(t):
        part.requires_grad_()
    x = torch.randn(2, 13, requires_grad=True)
    arguments = (x, t.weight, t.bias, t.threshold, t.scale, t.lr_a, t.lr_b)
    outcome = torch.library.opcheck(native.native_linear, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
def test_compiles_into_one_graph(trained: bool) -> None:
    site = [tensors(9, 13, 3), tensors(4, 13)]
    x = torch.randn(5, 13, requires_grad=trained)

    def function(x: Tensor) -> Tensor:
        first, second = native.run(x * 2, site)
        return first.sum(-1) + second.relu().sum(-1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    if trained:
        (found,), (right,) = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, function))
        torch.testing.assert_close(found, right)


def test_weights_elsewhere_are_refused_with_gradients_too() -> None:
    """The operator's rule for shapes must not answer for tensors without data."""
    t = SparseTensors(torch.randn(9, 13, device="meta"), None, torch.tensor(0.6))
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        native.run(torch.randn(2, 13, requires_grad=True), [t])
