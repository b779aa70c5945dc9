"""The truncated SVD: exact against torch's, randomised against the optimum, the error that is stated, and `--svd`."""

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, RSparse, SparsifyError
from sparsify.checkpoint import read_config
from sparsify.low_rank import is_exact, low_rank, sketch_columns


def weight_of(outputs: int, inputs: int, *, decay: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random weight whose singular values fall as i^-decay; 0 is the worst case for a sketch."""
    generator = torch.Generator().manual_seed(3)
    smaller = min(outputs, inputs)
    u = torch.linalg.qr(torch.randn(outputs, smaller, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(inputs, smaller, generator=generator, dtype=torch.float64)).Q
    s = torch.arange(1, smaller + 1, dtype=torch.float64) ** -decay
    return ((u * s) @ v.T).to(dtype)


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 160), (160, 96), (128, 128)])
def test_exact_is_the_truncated_svd(outputs: int, inputs: int) -> None:
    weight = weight_of(outputs, inputs, decay=0.5)
    found = low_rank(weight, 20)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    assert found.exact
    torch.testing.assert_close((found.lr_b @ found.lr_a).double(), (u[:, :20] * s[:20]) @ vh[:20], rtol=0, atol=1e-6)
    assert found.error(20) == pytest.approx(float(s[20:].norm() / s.norm()), rel=1e-9)
    assert None not in found.energy_ranks()


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("outputs", "inputs"), [(200, 320), (320, 200)])
def test_randomised_is_close_to_the_optimum_and_states_its_error(outputs: int, inputs: int, decay: float) -> None:
    weight = weight_of(outputs, inputs, decay=decay)
    rank = 40
    found = low_rank(weight, rank, "randomised")
    s = torch.linalg.svdvals(weight.double())
    optimum = float(s[rank:].norm() / s.norm())
    assert not found.exact
    left = (weight - found.lr_b @ found.lr_a).norm() / weight.norm()
    # What it states is what its factors leave, up to their rounding, and no better than the best there is.
    assert found.error(rank) == pytest.approx(float(left), rel=1e-4)
    assert optimum <= found.error(rank) * (1 + 1e-6)
    assert found.error(rank) < 1.02 * optimum
    assert bool((found.singular_values <= s[:rank] * (1 + 1e-6)).all())


def test_parts_of_a_larger_rank_are_close_to_the_optimum_too() -> None:
    weight = weight_of(200, 320, decay=0.3)
    found, s = low_rank(weight, 40, "randomised"), torch.linalg.svdvals(weight.double())
    lr_a, lr_b = found.truncated(10)
    assert float((weight - lr_b @ lr_a).norm()) < 1.002 * float(s[10:].norm())
    assert found.error(10) == pytest.approx(float((weight - lr_b @ lr_a).norm() / weight.norm()), rel=1e-4)


def test_randomised_is_the_same_each_time_whatever_was_drawn_before() -> None:
    weight = weight_of(200, 320, decay=0.3, dtype=torch.bfloat16)
    first = low_rank(weight, 16, "randomised")
    torch.rand(7)
    second = low_rank(weight, 16, "randomised")
    assert torch.equal(first.lr_a, second.lr_a)
    assert torch.equal(first.lr_b, second.lr_b)
    assert first.lr_a.dtype == torch.bfloat16


def test_ranks_that_were_not_computed_are_unknown() -> None:
    weight = weight_of(200, 320, decay=0.5)
    exact, sketched = low_rank(weight, 40), low_rank(weight, 40, "randomised")
    half, most, nearly_all = exact.energy_ranks()
    assert most is not None
    assert most > 40
    assert sketched.energy_ranks() == (half, None, None)
    assert nearly_all is not None


def test_a_weight_of_zeros_has_factors_of_zeros() -> None:
    found = low_rank(torch.zeros(200, 320), 8, "randomised")
    assert not found.lr_a.any()
    assert not found.lr_b.any()
    assert found.error(8) == 0.0


def test_auto_is_exact_for_small_weights_and_large_ranks() -> None:
    assert is_exact("auto", 1024, 4096, 1)
    assert not is_exact("auto", 4096, 4096, 512)
    assert is_exact("auto", 4096, 4096, 1366)
    assert is_exact("exact", 8192, 8192, 1)
    assert not is_exact("randomised", 256, 256, 16)
    # A sketch as wide as the weight would be the weight.
    assert is_exact("randomised", 64, 64, 60)
    assert sketch_columns(60) >= 64


def test_a_conversion_says_which_factors_are_sketched(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    method = RSparse(sparsity=0.5, rho=0.8, svd="randomised")
    config = sparsify.convert(tiny_llama, method, tiny_calibration).config.quantization_config
    assert config.method_config["svd"] == "randomised"
    for entry in config.linears.values():
        assert entry.low_rank_error is not None
        assert 0.0 < entry.low_rank_error < 1.0
        assert entry.energy_ranks is not None
        assert None in entry.energy_ranks
    again = type(config).from_dict(config.to_dict())
    assert again.linears == config.linears


def test_auto_changes_nothing_for_a_small_model(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    config = sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.8), tiny_calibration).config.quantization_config
    assert "svd" not in config.method_config
    assert all(entry.low_rank_error is None for entry in config.linears.values())
    assert "low_rank_error" not in str(config.to_dict())


@pytest.mark.parametrize("method", [RSparse, sparsify.Auto])
def test_an_unknown_svd_is_refused(method: type) -> None:
    with pytest.raises(SparsifyError, match=r"unknown svd 'randomized'.*Did you mean 'randomised'"):
        method(sparsity=0.5, svd="randomized")


def test_a_sketched_checkpoint_is_saved_and_verified(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.8, svd="randomised"), tiny_calibration)
    folder = sparsify.save(model, tmp_path_factory.mktemp("sketched") / "out")
    assert sparsify.verify(folder) == []
    stored = read_config(folder).linears
    assert stored == model.config.quantization_config.linears
    assert not any(math.isnan(entry.low_rank_error or 0.0) for entry in stored.values())
