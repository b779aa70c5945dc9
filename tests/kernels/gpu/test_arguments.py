"""What the GPU kernels are given wrongly is refused in words that name it: never a crash, never a wrong result."""

import re
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.kernels.gpu.mlp import gated_mlp
from sparsify.kernels.spec import SparseTensors
from sparsify.kernels.triton_backend import run

Make = Callable[..., SparseTensors]

# What becomes of one tensor of a linear [9, 13] of rank 3, and what is said about it.
CHANGES: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("weight", lambda t: t.half(), "weight is torch.float16, the Triton kernels need torch.float32 here"),
    ("weight", lambda t: t.contiguous(), "weight [9, 13] has strides (13, 1): it must be channel-contiguous"),
    ("weight", lambda t: t[:, :12], "the input has 13 channels, which a weight of [9, 12] does not take"),
    ("weight", lambda t: t[0], "the input has 13 channels, which a weight of [13] does not take"),
    ("weight", lambda t: t[None], "the input has 13 channels, which a weight of [1, 9, 13] does not take"),
    ("weight", lambda t: t[:1].expand(9, 13), "weight [9, 13] has strides (0, 9): it must be channel-contiguous"),
    ("weight", lambda t: t.as_strided((9, 13), (1, 8)), "weight [9, 13] has strides (1, 8)"),
    ("weight", lambda t: t.to("meta"), "weight is on meta, the input on "),
    ("bias", lambda t: t.double(), "bias is torch.float64, the Triton kernels need torch.float32 here"),
    ("bias", lambda t: t[:8], "bias has the shape [8], it must be [9]"),
    ("bias", lambda t: t[:1].expand(9), "bias has strides (0,): it must be contiguous"),
    ("bias", lambda t: t.to("meta"), "bias is on meta, the input on "),
    ("threshold", lambda t: t.bfloat16(), "threshold is torch.bfloat16, the Triton kernels need torch.float32 here"),
    ("threshold", lambda t: t[None], "threshold has the shape [1], it must be []"),
    ("threshold", lambda t: t.to("meta"), "threshold is on meta, the input on "),
    ("scale", lambda t: t.bfloat16(), "scale is torch.bfloat16, the Triton kernels need torch.float32 here"),
    ("scale", lambda t: t[:9], "scale has the shape [9], it must be [13]"),
    ("scale", lambda t: torch.stack([t, t], 1)[:, 0], "scale has strides (2,): it must be contiguous"),
    ("lr_a", lambda t: t.half(), "lr_a is torch.float16, the Triton kernels need torch.float32 here"),
    ("lr_a", lambda t: t[:, :12], "lr_a has the shape [3, 12], it must be [3, 13]"),
    ("lr_a", lambda t: t[0], "lr_a has the shape [13], it must be [-1, 13]"),
    ("lr_a", lambda t: t.t().contiguous().t(), "lr_a has strides (1, 3): it must be contiguous"),
    ("lr_b", lambda t: t.half(), "lr_b is torch.float16, the Triton kernels need torch.float32 here"),
    ("lr_b", lambda t: t[:, :2], "lr_b has the shape [9, 2], it must be [9, 3]"),
    ("lr_b", lambda t: t.contiguous(), "lr_b [9, 3] has strides (3, 1): it must be channel-contiguous"),
]


@pytest.mark.parametrize(("name", "change", "message"), CHANGES, ids=[message for _, _, message in CHANGES])
def test_tensors_that_do_not_fit(
    name: str, change: Callable[[Tensor], Tensor], message: str, linear: Make, device: torch.device
) -> None:
    """For any number of tokens, also where torch does the product, and wherever in the site the linear stands."""
    good = linear(9, 13, 3)
    bad = replace(good, **{name: change(getattr(good, name))})
    for tokens, site in ((1, [bad]), (20, [bad]), (0, [bad]), (2, [good, bad])):
        with pytest.raises(SparsifyError, match=re.escape(message)):
            run(torch.randn(tokens, 13).to(device), site)


@pytest.mark.parametrize("name", ["lr_a", "lr_b"])
def test_one_low_rank_factor_without_the_other(name: str, linear: Make, device: torch.device) -> None:
    t = replace(linear(9, 13, 3), **{name: None})
    with pytest.raises(SparsifyError, match="lr_a and lr_b belong together: one of them is missing"):
        run(torch.randn(1, 13).to(device), [t])


def test_dtypes_that_are_not_covered(linear: Make, device: torch.device) -> None:
    t = linear(9, 13)
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(SparsifyError, match=f"take bfloat16, float16, float32, not {dtype}"):
            run(torch.ones(1, 13, device=device, dtype=dtype), [t])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_inputs_without_channels(shape: tuple[int, ...], linear: Make, device: torch.device) -> None:
    with pytest.raises(SparsifyError, match=re.escape(f"the input has the shape {list(shape)}: it has no channels")):
        run(torch.ones(shape, device=device), [linear(9, 13)])


def test_every_tensor_of_a_linear_is_checked() -> None:
    assert {name for name, _, _ in CHANGES} == {field.name for field in fields(SparseTensors)} - {"density"}


# ---- the gated MLP ----


@pytest.fixture
def mlp(linear: Make) -> dict[str, SparseTensors]:
    """gate and up [11, 13], down [9, 11]."""
    return {"gate": linear(11, 13), "up": linear(11, 13), "down": linear(9, 11)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activation": "sliu"},
            "unknown activation 'sliu': there are silu, gelu, gelu_pytorch_tanh, relu. Did you mean",
        ),
        ({"activation": "tanh"}, "unknown activation 'tanh': there are silu, gelu, gelu_pytorch_tanh, relu."),
        ({"activation": "silu", "cut": 0.5}, "a cut of 0.5 is for relu (FATReLU), not for silu"),
        ({"activation": "relu", "cut": -0.5}, "the cut is -0.5, it must be at least 0"),
        ({"activation": "relu", "cut": float("nan")}, "the cut is nan, it must be at least 0"),
    ],
    ids=str,
)
def test_options_of_the_mlp(
    options: dict[str, object], message: str, mlp: dict[str, SparseTensors], device: torch.device
) -> None:
    with pytest.raises(SparsifyError, match=re.escape(message)):
        gated_mlp(torch.randn(1, 13).to(device), **mlp, **options)


@pytest.mark.parametrize(
    ("shape", "said"), [((9, 13), "not 9"), ((0, 13), "not 0"), ((3, 3, 13), "not 9"), ((2, 0, 13), "not 0")], ids=str
)
def test_numbers_of_tokens_of_the_mlp(
    shape: tuple[int, ...], said: str, mlp: dict[str, SparseTensors], device: torch.device
) -> None:
    with pytest.raises(SparsifyError, match=f"the gated MLP takes 1 to 8 tokens, {said}"):
        gated_mlp(torch.randn(shape).to(device), **mlp, activation="silu")


def test_linears_of_the_mlp_that_do_not_fit(mlp: dict[str, SparseTensors], linear: Make, device: torch.device) -> None:
    x = torch.randn(1, 13).to(device)
    for bad, message in (
        ({"up": linear(10, 13)}, "gate has 11 neurons, up has 10"),
        ({"down": linear(9, 10)}, "the input has 11 channels, which a weight of [9, 10] does not take"),
        ({"gate": linear(11, 12)}, "the input has 13 channels, which a weight of [11, 12] does not take"),
        ({"up": linear(11, 13, dtype=torch.float16)}, "weight is torch.float16"),
        ({"down": linear(9, 11, dtype=torch.bfloat16)}, "weight is torch.bfloat16"),
    ):
        with pytest.raises(SparsifyError, match=re.escape(message)):
            gated_mlp(x, **(mlp | bad), activation="silu")


def test_a_row_major_up_is_for_relu_and_one_token(
    mlp: dict[str, SparseTensors], linear: Make, device: torch.device
) -> None:
    """And without low-rank rows: else it is refused, not read as if it were channel-contiguous."""
    by_rows = replace(mlp["up"], weight=mlp["up"].weight.contiguous())
    low_rank = replace(linear(11, 13, 2), weight=by_rows.weight)
    for tokens, up, activation in ((1, by_rows, "silu"), (2, by_rows, "relu"), (1, low_rank, "relu")):
        with pytest.raises(SparsifyError, match=r"weight \[11, 13\] has strides \(13, 1\)"):
            gated_mlp(torch.randn(tokens, 13).to(device), **(mlp | {"up": up}), activation=activation)


def test_the_mlp_has_no_gradients(mlp: dict[str, SparseTensors], device: torch.device) -> None:
    x = torch.randn(1, 13).to(device)
    for trained in (x.clone().requires_grad_(), x):
        if trained is x:
            mlp["down"].weight.requires_grad_()
        with pytest.raises(SparsifyError, match=r"no gradients: call it under torch.no_grad\(\)"):
            gated_mlp(trained, **mlp, activation="silu")
        with torch.no_grad():
            assert gated_mlp(trained, **mlp, activation="silu").isfinite().all()
