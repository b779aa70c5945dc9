"""The product of one input site against the equation in fp64: shapes, dtypes, masks, forms, tiles and bad values."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.gpu.site import (
    ACTIVATIONS,
    DTYPES,
    Lists,
    groups,
    is_indexed,
    multiprocessors_of,
    on_device,
    row_stride,
    run_select,
    run_site,
)
from sparsify.kernels.gpu.tiles import RULES, Table, Tile
from sparsify.kernels.reference import keep_mask, sparse_linear
from sparsify.kernels.spec import SparseTensors

Make = Callable[..., SparseTensors]
Error = Callable[[Tensor, Tensor, SparseTensors], float]

# Wide blocks: the interpreter's time is set by the number of programs and of their turns.
TILE = Tile(block_n=64, block_k=32, splits=2, warps=4, stages=3)
FORMS = pytest.mark.parametrize("indexed", [False, True], ids=["masked", "indexed"])

# inputs, outputs of the linears, their ranks, bias, scale
SITES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], bool, bool]] = {
    "one number": (1, (1,), (0,), False, False),
    "one column": (70, (1,), (3,), True, True),
    "one channel, low rank on the outer ones": (1, (70, 2, 3), (1, 0, 2), True, False),
    "whole blocks": (64, (64, 128), (0, 0), False, True),
    "three, low rank on the middle one": (37, (33, 1, 65), (0, 5, 0), False, True),
    "three, low rank on each": (100, (65, 64, 3), (2, 3, 40), True, True),
}


def site_of(name: str, linear: Make, dtype: torch.dtype, threshold: float = 0.6) -> tuple[int, list[SparseTensors]]:
    inputs, outputs, ranks, bias, scaled = SITES[name]
    site = [
        linear(n, inputs, rank, dtype=dtype, bias=bias, scaled=scaled, threshold=threshold + 0.2 * k)
        for k, (n, rank) in enumerate(zip(outputs, ranks, strict=True))
    ]
    return inputs, site


def identity(inputs: int, dtype: torch.dtype, device: torch.device, threshold: float = -1.0) -> SparseTensors:
    """Its output is its input where that is kept: one term a sum, so no rounding."""
    return SparseTensors(torch.eye(inputs).to(device, dtype).t(), None, torch.tensor(threshold, device=device))


def in_wider_buffer(weight: Tensor) -> Tensor:
    """The same weight with NaN between its channels."""
    outputs, inputs = weight.shape
    wide = torch.full((inputs, outputs + 5), math.nan, dtype=weight.dtype, device=weight.device)
    wide[:, 2:-3] = weight.t()
    return wide[:, 2:-3].t()


# ---- values ----


@FORMS
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", SITES)
def test_equals_the_equation(
    name: str, tokens: int, indexed: bool, linear: Make, error: Error, scratch: Scratch, device: torch.device
) -> None:
    inputs, site = site_of(name, linear, torch.bfloat16)
    x = torch.randn(tokens, inputs).to(device, torch.bfloat16)
    found = run_site(x, site, scratch=scratch, indexed=indexed, tile=TILE)
    assert [list(y.shape) for y in found] == [[tokens, len(t.weight)] for t in site]
    for k, (y, t) in enumerate(zip(found, site, strict=True)):
        assert y.dtype == x.dtype
        assert error(y, x, t) <= 1, k


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize(("dtype", "indexed"), [(torch.float16, True), (torch.float32, False)], ids=str)
def test_other_dtypes(
    dtype: torch.dtype, tokens: int, indexed: bool, linear: Make, error: Error, scratch: Scratch, device: torch.device
) -> None:
    inputs, site = site_of("three, low rank on each", linear, dtype)
    x = torch.randn(tokens, inputs).to(device, dtype)
    for y, t in zip(run_site(x, site, scratch=scratch, indexed=indexed, tile=TILE), site, strict=True):
        assert y.dtype == dtype
        assert error(y, x, t) <= 1


@FORMS
def test_every_number_of_tokens(
    indexed: bool, linear: Make, error: Error, scratch: Scratch, device: torch.device
) -> None:
    inputs, site = site_of("three, low rank on the middle one", linear, torch.bfloat16)
    for tokens in range(2, 9):
        x = torch.randn(tokens, inputs).to(device, torch.bfloat16)
        for y, t in zip(run_site(x, site, scratch=scratch, indexed=indexed, tile=TILE), site, strict=True):
            assert error(y, x, t) <= 1, tokens


@FORMS
@pytest.mark.parametrize("tokens", [1, 4])
def test_densities(
    tokens: int, indexed: bool, linear: Make, error: Error, scratch: Scratch, device: torch.device
) -> None:
    """Of the channels of the first of two linears: all, half, one, none. Where none is kept, y is the bias exactly."""
    x = torch.randn(tokens, 100).to(device, torch.bfloat16)
    first, second = linear(65, 100, dtype=x.dtype), linear(40, 100, dtype=x.dtype)
    score = (x[0].float().abs() * first.scale).sort(descending=True).values
    for threshold in (-1.0, float(score[50]), float(score[1]), math.inf):
        first = replace(first, threshold=torch.tensor(threshold, device=device))
        for site in ((first, second), (second, first)):
            found = run_site(x, site, scratch=scratch, indexed=indexed, tile=TILE)
            assert all(error(y, x, t) <= 1 for y, t in zip(found, site, strict=True)), threshold
            if threshold == math.inf:
                assert torch.equal(found[0 if site[0] is first else 1], first.bias.expand(tokens, -1))


@pytest.mark.parametrize(
    "tile",
    [
        Tile(block_n=16, block_k=16, splits=1, warps=1, stages=1),
        Tile(block_n=256, block_k=16, splits=1, warps=4, stages=4),
        Tile(block_n=64, block_k=32, splits=3, warps=2, stages=2),
        Tile(block_n=128, block_k=128, splits=32, warps=8, stages=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_tiles(tile: Tile, tokens: int, linear: Make, error: Error, scratch: Scratch, device: torch.device) -> None:
    """Blocks wider than the weight, parts without channels, one part."""
    x = torch.randn(tokens, 100).to(device, torch.bfloat16)
    site = [linear(130, 100, 3, dtype=x.dtype), linear(7, 100, 20, dtype=x.dtype)]
    for y, t in zip(run_site(x, site, scratch=scratch, indexed=tokens == 1, tile=tile), site, strict=True):
        assert error(y, x, t) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tiles_of_the_rule(
    dtype: torch.dtype, linear: Make, error: Error, scratch: Scratch, device: torch.device
) -> None:
    for tokens in (1, 2):
        x = torch.randn(tokens, 128).to(device, dtype)
        t = linear(70, 128, dtype=dtype)
        assert error(run_site(x, [t], scratch=scratch)[0], x, t) <= 1


@pytest.mark.parametrize(("tokens", "indexed"), [(1, False), (3, True)], ids=str)
def test_weights_of_a_wider_buffer(
    tokens: int, indexed: bool, linear: Make, scratch: Scratch, device: torch.device
) -> None:
    """Nothing beside the weight is read into the result, whatever the alignment."""
    x = torch.randn(tokens, 100).to(device, torch.bfloat16)
    site = [linear(n, 100, dtype=x.dtype) for n in (65, 64)]
    wider = [replace(t, weight=in_wider_buffer(t.weight)) for t in site]
    assert [row_stride(t) for t in wider] == [70, 69]
    expected = run_site(x, site, scratch=scratch, indexed=indexed, tile=TILE)
    found = run_site(x, wider, scratch=scratch, indexed=indexed, tile=TILE)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_linear_without_outputs(linear: Make, error: Error, scratch: Scratch, device: torch.device) -> None:
    x = torch.randn(2, 20).to(device)
    site = [linear(0, 20), linear(5, 20)]
    found = run_site(x, site, scratch=scratch, indexed=False, tile=TILE)
    assert found[0].shape == (2, 0)
    assert error(found[1], x, site[1]) <= 1


# ---- the mask ----


@FORMS
@pytest.mark.parametrize(("dtype", "tokens"), [*((dtype, 1) for dtype in DTYPES), (torch.bfloat16, 8)], ids=str)
def test_the_mask_is_the_references(
    dtype: torch.dtype, tokens: int, indexed: bool, scratch: Scratch, device: torch.device
) -> None:
    """Thresholds on, just under and just over a channel's score: a threshold rounded to bf16 would keep others."""
    t = identity(60, dtype, device)
    x = torch.randn(tokens, 60).to(device, dtype)
    x[0, :2] = torch.tensor([0.0, -0.0])
    ends = torch.tensor(-math.inf, device=device), torch.tensor(math.inf, device=device)
    for scale in (None, (torch.rand(60) + 0.5).to(device)):
        score = (x.float().abs() * (1.0 if scale is None else scale))[-1]
        near = [value for at in (5, 40) for value in (score[at], *(score[at].nextafter(end) for end in ends))]
        for threshold in (*near, torch.tensor(0.0, device=device)):
            keep = keep_mask(x, threshold, scale)
            given = replace(t, threshold=threshold.clone(), scale=scale)
            (y,) = run_site(x, [given], scratch=scratch, indexed=indexed, tile=TILE)
            assert torch.equal(y, torch.where(keep, x, 0.0)), threshold


@FORMS
def test_a_threshold_between_two_halves_is_not_rounded(indexed: bool, scratch: Scratch, device: torch.device) -> None:
    """0.3 is 0.30078125 in bf16, which is above the threshold and would not be above a rounded one."""
    t = identity(4, torch.bfloat16, device, 0.3)
    x = torch.tensor([[0.3, -0.3, 0.298828125, 0.0]]).to(device, torch.bfloat16)
    (y,) = run_site(x, [t], scratch=scratch, indexed=indexed, tile=TILE)
    assert y.tolist() == [[0.30078125, -0.30078125, 0.0, 0.0]]


@FORMS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [1, 4])
def test_inputs_that_are_not_finite(
    tokens: int, bad: float, indexed: bool, linear: Make, scratch: Scratch, device: torch.device
) -> None:
    """They are kept, and reach the outputs of their token as in the reference, where a weight is 0 too."""
    t = linear(33, 40, dtype=torch.bfloat16, threshold=2.0)
    t.weight[5, 20] = 0.0
    x = torch.randn(tokens, 40).to(device, torch.bfloat16)
    x[tokens // 2, 20] = bad
    expected = sparse_linear(x, t)
    (found,) = run_site(x, [t], scratch=scratch, indexed=indexed, tile=TILE)
    assert not found[tokens // 2].isfinite().any()
    for of in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(of(found), of(expected)), of


@FORMS
def test_nan_and_infinite_thresholds(indexed: bool, scratch: Scratch, device: torch.device) -> None:
    """keep = ¬(score ≤ threshold): a NaN is kept by an infinite threshold, everything by a NaN."""
    x = torch.tensor([[1.0, math.nan, math.inf, 0.0]], device=device)
    (y,) = run_site(x, [identity(4, x.dtype, device, math.nan)], scratch=scratch, indexed=indexed, tile=TILE)
    assert y.isnan().all()
    x = torch.tensor([[1.0, 0.0, math.inf, 0.0]], device=device)
    (y,) = run_site(x, [identity(4, x.dtype, device, math.inf)], scratch=scratch, indexed=indexed, tile=TILE)
    assert not y.any()


@FORMS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tokens", [1, 4])
def test_weights_of_dropped_channels_are_not_read(
    tokens: int, bad: float, indexed: bool, linear: Make, scratch: Scratch, device: torch.device
) -> None:
    """For several tokens: of channels that none of them keeps. Nor is A of channels that are kept."""
    x = torch.randn(tokens, 70).to(device, torch.bfloat16)
    site = [linear(33, 70, rank, dtype=x.dtype, threshold=1.2) for rank in (0, 4)]
    expected = run_site(x, site, scratch=scratch, indexed=indexed, tile=TILE)
    for t in site:
        dropped = ~keep_mask(x, t.threshold, t.scale).any(0)
        assert dropped.any()
        t.weight[:, dropped] = bad
    found = run_site(x, site, scratch=scratch, indexed=indexed, tile=TILE)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- the input act(x) · up ----


@pytest.mark.parametrize(
    ("activation", "dtype"), [*((name, torch.float32) for name in ACTIVATIONS), ("silu", torch.bfloat16)], ids=str
)
def test_gated_inputs(
    activation: str, dtype: torch.dtype, scratch: Scratch, device: torch.device, rounding: Callable[..., float]
) -> None:
    """Rounded after the activation and after the product, as the modules do; far out too, where exp overflows."""
    t = identity(60, dtype, device)
    gate = torch.cat([torch.randn(52), torch.tensor([0.0, -0.0, 30.0, -30.0, 200.0, -200.0, 1e4, -1e4])])
    gate, up = gate[None].to(device, dtype), torch.randn(1, 60).to(device, dtype)
    (found,) = run_site(gate, [t], up=up, activation=activation, scratch=scratch, indexed=False, tile=TILE)
    expected = ACT2FN[activation](gate.double()) * up.double()
    # Two roundings; gelu takes its smallest results off numbers near 1.
    allowed = 2.1 * rounding(dtype) * expected.abs()
    allowed += 4 * torch.finfo(torch.float32).eps * (gate * up).double().abs().clamp(max=10)
    assert bool(((found.double() - expected).abs() <= allowed).all())
    # Where the gate is 0, and where act(gate) is 0 to the last digit.
    assert not found[0, [52, 53, 57, 59]].any()


@FORMS
@pytest.mark.parametrize("tokens", [1, 3])
def test_gated_inputs_are_cut_after_the_product(
    tokens: int, indexed: bool, linear: Make, error: Error, scratch: Scratch, device: torch.device
) -> None:
    """And after its rounding; with low-rank rows, whose t is of the same input."""
    dtype = torch.bfloat16
    t = linear(65, 100, 3, dtype=dtype, threshold=0.2)
    gate, up = torch.randn(2, tokens, 100).to(device, dtype)
    eye = identity(100, dtype, device)
    (x,) = run_site(gate, [eye], up=up, scratch=scratch, indexed=False, tile=TILE)
    (found,) = run_site(gate, [t], up=up, scratch=scratch, indexed=indexed, tile=TILE)
    assert error(found, x, t) <= 1


# ---- what is launched ----


@pytest.mark.parametrize("rank", [0, 3])
def test_lists_of_an_earlier_launch(rank: int, linear: Make, scratch: Scratch, device: torch.device) -> None:
    x = torch.randn(1, 100).to(device, torch.bfloat16)
    site = [linear(n, 100, rank, dtype=x.dtype) for n in (33, 64)]
    lists = run_select(x, site, scratch=scratch)
    assert isinstance(lists, Lists)
    found = run_site(x, site, scratch=scratch, lists=lists, tile=TILE)
    expected = run_site(x, site, scratch=scratch, indexed=True, tile=TILE)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("densities", "indexed"),
    [((None,), False), ((0.1,), True), ((0.25,), False), ((0.1, None), False), ((0.1, 0.2), True), ((0.1, 0.3), False)],
    ids=str,
)
def test_the_form_follows_the_density(densities: Sequence[float | None], indexed: bool, linear: Make) -> None:
    site = [linear(2, 3, density=density) for density in densities]
    assert is_indexed(site, RULES) is indexed
    assert not is_indexed(site, Table("none is", 0.0, {}))


def test_the_density_is_no_part_of_the_result(
    linear: Make, error: Error, scratch: Scratch, device: torch.device
) -> None:
    """A hint that is wrong is slow and right."""
    x = torch.randn(1, 100).to(device)
    for density, threshold in itertools.product((0.01, 1.0), (-1.0, math.inf)):
        t = linear(33, 100, density=density, threshold=threshold)
        assert error(run_site(x, [t], scratch=scratch, tile=TILE)[0], x, t) <= 1


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("", []),
        ("b", [[0]]),
        ("bbb", [[0, 1, 2]]),
        ("bbbb", [[0, 1, 2], [3]]),
        ("b-b", [[0], [1], [2]]),
        ("--bb", [[0, 1], [2, 3]]),
        ("-s", [[0], [1]]),
    ],
)
def test_neighbours_that_are_alike_share_a_launch(kinds: str, expected: list[list[int]], linear: Make) -> None:
    site = [linear(2, 3, bias=kind == "b", scaled=kind == "s") for kind in kinds]
    assert groups(site) == expected


def test_the_stride_of_one_channel_does_not_matter(linear: Make, error: Error, scratch: Scratch) -> None:
    """torch may give a dimension of 1 any stride."""
    t = linear(5, 1)
    t = replace(t, weight=t.weight.as_strided((5, 1), (1, 999)))
    assert row_stride(t) == 5
    x = torch.ones(1, 1, device=scratch.device)
    assert error(run_site(x, [t], scratch=scratch, tile=TILE)[0], x, t) <= 1


def test_what_is_no_gpu_needs_no_driver() -> None:
    for device in (torch.device("cpu"), torch.device("meta")):
        assert multiprocessors_of(device) >= 1
        with on_device(device):
            pass


# ---- on a GPU only ----


@pytest.mark.gpu
@FORMS
@pytest.mark.parametrize("tokens", [1, 8])
def test_two_runs_give_the_same_bits(tokens: int, indexed: bool, linear: Make, device: torch.device) -> None:
    """Large enough that programs run at the same time and end in another order."""
    x = torch.randn(tokens, 4096).to(device, torch.bfloat16)
    site = [linear(n, 4096, 16, dtype=x.dtype) for n in (4096, 1024, 1024)]
    scratch = Scratch(device)
    results = [torch.cat(run_site(x, site, scratch=scratch, indexed=indexed), 1) for _ in range(50)]
    assert all(torch.equal(results[0], other) for other in results)
    assert not scratch._ring.any()


@pytest.mark.gpu
def test_two_streams_share_a_scratch(linear: Make, error: Error, device: torch.device) -> None:
    """Launches that run at the same time have counters of their own."""
    x = torch.randn(1, 2048).to(device, torch.bfloat16)
    t, scratch = linear(1024, 2048, dtype=x.dtype), Scratch(device)
    (expected,) = run_site(x, [t], scratch=scratch)
    streams = [torch.cuda.Stream(device) for _ in range(4)]
    torch.cuda.synchronize()
    found: list[Any] = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run_site(x, [t], scratch=scratch)[0])
    torch.cuda.synchronize()
    assert error(expected, x, t) <= 1
    assert all(torch.equal(expected, y) for y in found)
