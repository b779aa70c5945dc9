"""What the native kernels are given wrongly is refused in words: never a crash, never a wrong result."""

import _ctypes
import ctypes
import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.kernels import library, native
from sparsify.kernels.native_mlp import gated_mlp
from sparsify.kernels.reference import keep_mask
from sparsify.kernels.spec import SparseTensors

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

# The fixtures only set random numbers and the filling of memory, which do not change from example to example.
_FUZZ = settings(
    derandomize=True, deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARTS = [field.name for field in fields(SparseTensors)]


def tensors(outputs: int, inputs: int, rank: int, dtype: torch.dtype, threshold: float, rows: bool) -> SparseTensors:
    weight = torch.randn(outputs, inputs).to(dtype)
    return SparseTensors(
        weight=weight if rows else weight.t().contiguous().t(),
        bias=torch.randn(outputs).to(dtype),
        threshold=torch.tensor(threshold),
        scale=torch.rand(inputs) + 0.5,
        lr_a=torch.randn(rank, inputs).to(dtype),
        lr_b=torch.randn(rank, outputs).to(dtype).t(),
    )


def overlapping(tensor: Tensor) -> Tensor:
    """The same shape, whose elements share memory: every stride is 1."""
    return torch.randn(sum(tensor.shape) + 1).to(tensor.dtype).as_strided(tensor.shape, [1] * tensor.dim())


def apart(tensor: Tensor) -> Tensor:
    """The same values with a gap behind each."""
    return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0]


def gap_between_rows(tensor: Tensor) -> Tensor:
    """The same values in a wider buffer."""
    return (
        torch.cat([tensor, torch.full_like(tensor, math.nan)], -1)[..., : tensor.shape[-1]] if tensor.dim() else tensor
    )


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def repeated(tensor: Tensor) -> Tensor:
    """The same shape with all strides 0."""
    return tensor.flatten()[:1].squeeze().expand(tensor.shape) if tensor.numel() else tensor


def longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[..., -1:]], -1) if tensor.dim() else tensor[None]


def shorter(tensor: Tensor) -> Tensor:
    return tensor[..., :-1].contiguous() if tensor.dim() else tensor[None]


def trained(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


# Each makes one tensor into another: of the same meaning, of another one, or of none.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "fp64": torch.Tensor.double,
    "fp32": torch.Tensor.float,
    "bf16": torch.Tensor.bfloat16,
    "int64": torch.Tensor.long,
    "bool": torch.Tensor.bool,
    "one dimension more": lambda tensor: tensor[None],
    "one dimension less": lambda tensor: tensor.flatten(),
    "no dimension": lambda tensor: tensor.flatten()[:1].squeeze(),
    "no element": lambda tensor: tensor[..., :0] if tensor.dim() else tensor[None][:0],
    "no row": lambda tensor: tensor[:0] if tensor.dim() else tensor,
    "longer": longer,
    "shorter": shorter,
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.dim() else tensor,
    "transposed in memory": lambda tensor: (
        tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() else tensor
    ),
    "contiguous": torch.Tensor.contiguous,
    "stride 0": repeated,
    "overlapping": overlapping,
    "with gaps": apart,
    "of a wider buffer": gap_between_rows,
    "a negative view": torch._neg_view,
    "on meta": on_meta,
    "trained": trained,
    "not finite": lambda tensor: torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor,
}


@st.composite
def linears(draw: st.DrawFn) -> tuple[Tensor, SparseTensors]:
    """An input and a linear that fit together."""
    dtype, rank = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([0, 1, 2, 5]))
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 5), (0,), (100,)]))
    outputs, inputs = draw(st.sampled_from([(1, 1), (1, 5), (5, 1), (4, 4), (7, 3), (33, 20), (20, 33)]))
    threshold = draw(st.sampled_from([0.6, -1.0, 0.0, math.inf, -math.inf, math.nan]))
    t = tensors(outputs, inputs, rank, dtype, threshold, draw(st.booleans()))
    absent = draw(st.sets(st.sampled_from(["bias", "scale", "low rank"])))
    t = replace(t, **dict.fromkeys(absent - {"low rank"}))
    return torch.randn(*lead, inputs).to(dtype), replace(t, lr_a=None, lr_b=None) if "low rank" in absent else t


changes = st.lists(st.tuples(st.sampled_from(["x", *PARTS]), st.sampled_from(sorted(CHANGES))), min_size=1, max_size=2)
absences = st.sets(st.sampled_from(["lr_a", "lr_b"])) | st.just(set())


def changed(x: Tensor, t: SparseTensors, what: list[tuple[str, str]]) -> tuple[Tensor, SparseTensors]:
    for name, change in what:
        tensor = x if name == "x" else getattr(t, name)
        if tensor is None:
            continue
        tensor = CHANGES[change](tensor)
        x, t = (tensor, t) if name == "x" else (x, replace(t, **{name: tensor}))
    return x, t


def fits(x: Tensor, t: SparseTensors) -> bool:
    """Whether the tensors are what SparseTensors says, in shapes, dtypes and devices."""
    if x.dim() == 0 or t.weight.dim() != 2 or (t.lr_a is None) != (t.lr_b is None):
        return False
    outputs, inputs = t.weight.shape
    rank = None if t.lr_a is None else t.lr_a.shape[0]
    shapes = {"bias": (outputs,), "threshold": (), "scale": (inputs,), "lr_a": (rank, inputs), "lr_b": (outputs, rank)}
    given_parts = {name: getattr(t, name) for name in shapes if getattr(t, name) is not None}
    return (
        x.shape[-1] == inputs
        and all(part.shape == shapes[name] for name, part in given_parts.items())
        and all(part.device.type == "cpu" for part in (x, t.weight, *given_parts.values()))
        and all(part.dtype == (torch.float32 if name in ("threshold", "scale") else x.dtype)
                for name, part in (("weight", t.weight), *given_parts.items()))
    )  # fmt: skip


def expected(x: Tensor, t: SparseTensors) -> tuple[Tensor, Tensor]:
    """y in fp64, with no part of a channel that is dropped, and the sum of the terms' magnitudes."""
    keep, wide = keep_mask(x, t.threshold, t.scale), x.double()
    kept = torch.where(keep, wide, 0.0)
    y, size = kept @ t.weight.double().t(), kept.abs() @ t.weight.double().abs().t()
    if t.lr_a is not None and t.lr_b is not None:
        rest, low = torch.where(keep, 0.0, wide), t.lr_a.double().t() @ t.lr_b.double().t()
        y, size = y + rest @ low, size + rest.abs() @ (t.lr_a.double().abs().t() @ t.lr_b.double().abs().t())
    return (y, size) if t.bias is None else (y + t.bias.double(), size + t.bias.double().abs())


def assert_computed_or_refused(x: Tensor, t: SparseTensors) -> None:
    try:
        (y,) = native.run(x, (t,))
    except SparsifyError:
        return
    assert fits(x, t)
    y_expected, size = expected(x, t)
    assert y.dtype == x.dtype
    assert y.shape == y_expected.shape
    if not all(part is None or part.isfinite().all() for part in (t.weight, t.lr_a, t.lr_b)):
        # Whether a NaN weight of a dropped channel shows is not said anywhere.
        return
    if y_expected.isfinite().all():
        # Four roundings at most, each of a sum of terms; in fp32, the sum's own.
        wrong = (y.double() - y_expected).abs() - 4 * torch.finfo(x.dtype).eps * size
        assert not y.numel() or float(wrong.detach().max()) <= 1e-7
    else:
        assert not y[~y_expected.isfinite()].isfinite().any()


@pytest.mark.parametrize("name", ["x", *PARTS])
@pytest.mark.parametrize("change", CHANGES)
def test_one_changed_tensor(change: str, name: str) -> None:
    for dtype, lead, shape, rows, with_gradients in itertools.product(
        DTYPES, [(), (3,), (100,)], [(1, 1), (20, 33)], (False, True), (False, True)
    ):
        t = tensors(*shape, 2, dtype, 0.6, rows)
        x = torch.randn(*lead, shape[1]).to(dtype).requires_grad_(with_gradients)
        assert_computed_or_refused(*changed(x, t, [(name, change)]))


@_FUZZ
@given(linear=linears(), what=changes, absent=absences, with_gradients=st.booleans())
def test_changed_and_missing_tensors(
    linear: tuple[Tensor, SparseTensors], what: list[tuple[str, str]], absent: set[str], with_gradients: bool
) -> None:
    linear[0].requires_grad_(with_gradients)
    x, t = changed(*linear, what)
    assert_computed_or_refused(x, replace(t, **dict.fromkeys(absent)))


@_FUZZ
@given(linear=linears())
def test_what_fits_is_not_refused(linear: tuple[Tensor, SparseTensors]) -> None:
    x, t = linear
    assert fits(x, t)
    assert native.run(x, (t,))[0].shape == (*x.shape[:-1], len(t.weight))


@pytest.mark.parametrize("name", ["x", *PARTS])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_one_changed_tensor_of_a_gated_mlp(change: str, name: str) -> None:
    shapes, leads = [(1, 1, 1), (3, 33, 20)], [(), (3,), (9,)]
    for dtype, shape, lead, rows, which in itertools.product(DTYPES, shapes, leads, (False, True), range(3)):
        inputs, neurons, outputs = shape
        parts = [
            tensors(neurons, inputs, 2, dtype, 0.2, False),
            tensors(neurons, inputs, 2 * (not rows), dtype, 0.2, rows),
            tensors(outputs, neurons, 2, dtype, 0.2, False),
        ]
        x, parts[which] = changed(torch.randn(*lead, inputs).to(dtype), parts[which], [(name, change)])
        try:
            y = gated_mlp(x, *parts, activation="relu")
        except SparsifyError:
            continue
        gate, up = native.run(x, parts[:2])
        (right,) = native.run(gate.relu() * up, parts[2:])
        assert y.shape == right.shape
        # Up's rows of neurons that are not active are skipped: a NaN in them does not come out.
        assert bool((y == right).logical_or(right.isnan()).all())


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.empty(0), torch.empty(3, 0)], ids=["no dimension", "0", "3, 0"])
def test_an_input_without_channels(x: Tensor) -> None:
    with pytest.raises(SparsifyError, match="has no channels"):
        native.run(x, [SparseTensors(torch.randn(4, 0), None, torch.tensor(0.6))])


@pytest.mark.parametrize("shape", [(2, 6), (2, 4), (5, 2), (1,)], ids=str)
def test_an_input_of_other_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(SparsifyError, match=rf"{shape[-1]} channels.*\[3, 5\]"):
        native.run(torch.randn(shape), [SparseTensors(torch.randn(3, 5), None, torch.tensor(0.6))])


@pytest.mark.parametrize("strides", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (1, 2), (2, 2), (6, 2)], ids=str)
def test_weights_in_strides_that_it_cannot_take(strides: tuple[int, int]) -> None:
    weight = torch.randn(40).as_strided((3, 5), strides)
    with pytest.raises(SparsifyError, match="strides"):
        native.run(torch.randn(5), [SparseTensors(weight, None, torch.tensor(0.6))])


def test_a_layer_of_no_outputs() -> None:
    for tokens in (1, 8, 130):
        (y,) = native.run(torch.randn(tokens, 5), [SparseTensors(torch.randn(0, 5), None, torch.tensor(0.6))])
        assert y.shape == (tokens, 0)


def test_no_linears() -> None:
    assert native.run(torch.randn(2, 5), []) == []


def test_the_library_refuses_what_has_no_meaning() -> None:
    loaded = library.load()
    x, y, pointers = torch.randn(8, 5), torch.empty(8, 3), (ctypes.c_void_p * 1)()
    pointers[0] = y.data_ptr()
    # What they point to must live as long as they do.
    three, four = (SparseTensors(torch.randn(size, 5), None, torch.tensor(0.6)) for size in (3, 4))
    linear, other = (ctypes.byref(native.checked(torch.float32, 5, t)) for t in (three, four))
    for dtype, inputs, tokens, count in [
        (3, 5, 1, 1), (-1, 5, 1, 1), (0, 0, 1, 1), (0, 5, 0, 1), (0, 5, 9, 1), (0, 5, 1, 0), (0, 5, 1, 9),
    ]:  # fmt: skip
        assert loaded.sp_site(dtype, x.data_ptr(), inputs, tokens, linear, count, pointers, 1) == -2
    for dtype, activation, tokens, up in [
        (3, 0, 1, linear), (0, 4, 1, linear), (0, -1, 1, linear),
        (0, 0, 0, linear), (0, 0, 9, linear), (0, 0, 1, other),
    ]:  # fmt: skip
        status = loaded.sp_mlp(dtype, activation, 0, x.data_ptr(), 5, tokens, linear, up, linear, y.data_ptr(), 1)
        assert status == -2
    assert loaded.sp_transpose(x.data_ptr(), y.data_ptr(), 2, 2, 8, 1) == -2
    assert loaded.sp_use_isa(b"avx1024") == -2
    assert loaded.sp_isa(-1) is None
    assert loaded.sp_isa(99) is None
    assert loaded.sp_sizeof(99) == -2
    # Threads that make no sense are one, or as many as there are CPUs.
    for threads in (-5, 0, 10**6):
        assert loaded.sp_site(0, x.data_ptr(), 5, 8, linear, 1, pointers, threads) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "cannot be loaded"), (b"\x7fELF" + bytes(100), "cannot be loaded"), (None, "not built")],
    ids=["empty", "garbage", "no file"],
)
def test_a_file_that_is_no_library(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "library.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        SparsifyError, match=rf"library\.so is not a library.*{words}.*python -m sparsify\.kernels\.build"
    ):
        library.open_library(path)


def test_a_library_of_something_else() -> None:
    with pytest.raises(SparsifyError, match=r"cannot be loaded.*sp_abi.*python -m sparsify\.kernels\.build"):
        library.open_library(Path(_ctypes.__file__))


@pytest.mark.parametrize("what", ["version", "struct"])
def test_a_library_of_another_version(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "version":
        monkeypatch.setattr(library, "ABI", library.ABI + 1)
    else:
        monkeypatch.setattr(library, "CBlock", library.CLinear)
    with pytest.raises(SparsifyError, match=r"another version.*python -m sparsify\.kernels\.build"):
        library.open_library(library.library_path())


def test_unknown_instruction_set() -> None:
    with pytest.raises(SparsifyError, match=r"no instruction set 'portabel' here.*Did you mean 'portable'\?"):
        library.use_isa(library.load(), "portabel")
