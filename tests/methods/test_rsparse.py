"""R-Sparse against its paper's equations, written out in plain loops, and its options and recipes."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, RSparse, SparsifyError, Teal, Wina, checkpoint
from sparsify.kernels.reference import keep_mask
from sparsify.linear import SparseLinear
from sparsify.runtime import sparse_layers

Q, K, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def inputs_of(model: PreTrainedModel, names: list[str], calibration: Calibration) -> dict[str, Tensor]:
    """Returns the inputs [T, I] of linears on the calibration text, all of them, in a plain forward."""
    modules = dict(model.named_modules())
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, 1)))
        for name in names
    ]
    with torch.no_grad(), sparsify.dense(model):
        for window in calibration.tokens:
            model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def low_rank_of(weight: Tensor, rank: int) -> Tensor:
    """L = U_r S_r V_rᵀ [O, I] in fp64."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


@pytest.fixture(scope="module")
def converted(trained: PreTrainedModel, trained_calibration: Calibration) -> PreTrainedModel:
    """The trained model; to be read only."""
    return sparsify.convert(copy.deepcopy(trained), RSparse(sparsity=0.5, rho=0.8), trained_calibration)


def test_score_is_the_row_norms_of_v_s(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.8), tiny_calibration)
    for layer in sparse_layers(tiny_llama).values():
        _, s, vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        row_norms = (vh.t() @ torch.diag(s)).norm(dim=1)
        torch.testing.assert_close(layer.scale.double(), row_norms, rtol=1e-6, atol=0)


def test_residual_norm_is_what_dropping_a_channel_costs(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.8, score="residual-norm"), tiny_calibration)
    layers, entries = sparse_layers(tiny_llama), tiny_llama.config.quantization_config.linears
    for name, x in inputs_of(tiny_llama, list(layers), tiny_calibration).items():
        layer = layers[name]
        assert layer.rank
        residual = layer.weight.detach().double() - low_rank_of(layer.weight.detach(), layer.rank)
        torch.testing.assert_close(layer.scale.double(), residual.norm(dim=0), rtol=1e-4, atol=1e-6)
        realised = float(keep_mask(x, layer.threshold, layer.scale).float().mean())
        assert realised == pytest.approx(entries[name].density, abs=0.005)


def test_score_auto_has_no_larger_error_than_any_score(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    def errors(score: str) -> list[float]:
        model = sparsify.convert(copy.deepcopy(tiny_llama), RSparse(sparsity=0.5, score=score), tiny_calibration)
        return [entry.error for entry in model.config.quantization_config.linears.values()]

    auto = errors("auto")
    for score in ("magnitude", "column-norm", "residual-norm"):
        assert all(a <= other for a, other in zip(auto, errors(score), strict=True))


@pytest.mark.parametrize("name", [Q, "model.layers.3.mlp.down_proj"])
def test_output_is_the_papers_on_real_activations(
    converted: PreTrainedModel, trained_inputs: dict[str, Tensor], name: str
) -> None:
    x = trained_inputs[name][:6]
    layer = sparse_layers(converted)[name]
    assert layer.rank > 0
    weight, low = layer.weight.detach().double(), low_rank_of(layer.weight.detach(), layer.rank)
    norms = [math.sqrt(sum(float(w) ** 2 for w in weight[:, j])) for j in range(layer.in_features)]
    expected = torch.zeros(len(x), layer.out_features, dtype=torch.float64)
    kept = 0
    for n, row in enumerate(x.tolist()):
        for j, value in enumerate(row):
            above = abs(value) * norms[j] > float(layer.threshold)
            kept += above
            expected[n] += (weight if above else low)[:, j] * value
    assert 0 < kept < x.numel()
    # fp32 weights and factors, sums of some hundred products.
    torch.testing.assert_close(layer(x).detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_factors_are_the_best_approximation(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.8), tiny_calibration)
    for layer in sparse_layers(tiny_llama).values():
        found = layer.lr_b.double() @ layer.lr_a.double()
        torch.testing.assert_close(found, low_rank_of(layer.weight.detach(), layer.rank), rtol=0, atol=1e-6)


def test_thresholds_are_quantiles_of_the_score(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.8), tiny_calibration)
    entries = tiny_llama.config.quantization_config.linears
    layers = sparse_layers(tiny_llama)
    for name, x in inputs_of(tiny_llama, list(layers), tiny_calibration).items():
        layer, entry = layers[name], entries[name]
        scores = (x.abs() * layer.weight.detach().norm(dim=0)).flatten()
        # A histogram bin is at most 0.4% wide.
        assert float(layer.threshold) == pytest.approx(float(scores.quantile(1 - entry.density)), rel=0.005)
        realised = float(keep_mask(x, layer.threshold, layer.scale).float().mean())
        assert realised == pytest.approx(entry.density, abs=0.005)


def test_budgets_come_from_the_linears_own_shape(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.8), tiny_calibration)
    for name, layer in sparse_layers(tiny_llama).items():
        inputs, outputs = layer.in_features, layer.out_features
        assert outputs == (32 if "k_proj" in name or "v_proj" in name else outputs)
        channels = math.floor(inputs * 0.5 * 0.8)
        assert layer.rank == math.floor((inputs * outputs * 0.5 - channels * outputs) / (inputs + outputs))
    ledger = sparsify.ledger_of(tiny_llama)
    assert ledger.weighted_sparsity == pytest.approx(0.5, abs=1e-9)


def test_recorded_errors_are_the_measured_ones(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.8), tiny_calibration)
    entries = tiny_llama.config.quantization_config.linears
    layers = sparse_layers(tiny_llama)
    for name, x in inputs_of(tiny_llama, [Q, K, DOWN], tiny_calibration).items():
        with torch.no_grad():
            exact, sparse = x @ layers[name].weight.t(), layers[name](x)
        # The mean over tokens, not the quotient of sums: outlier tokens must not decide alone.
        errors = (exact - sparse).square().sum(-1) / exact.square().sum(-1)
        assert entries[name].error == pytest.approx(float(errors.mean()), rel=1e-3)
        s = torch.linalg.svdvals(layers[name].weight.detach().double()).square()
        energy = s.cumsum(0) / s.sum()
        assert entries[name].energy_ranks == [int((energy < share).sum()) + 1 for share in (0.5, 0.9, 0.99)]


def test_rho_1_is_wina_exactly(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    other = sparsify.convert(copy.deepcopy(tiny_llama), Wina(sparsity=0.5), tiny_calibration)
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=1.0), tiny_calibration)
    assert_same(tiny_llama, other)


@pytest.mark.parametrize("score", ["published-code", "magnitude"])
def test_rho_1_with_the_published_codes_score_is_teal(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, score: str
) -> None:
    other = sparsify.convert(copy.deepcopy(tiny_llama), Teal(sparsity=0.5), tiny_calibration)
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=1.0, score=score), tiny_calibration)
    assert_same(tiny_llama, other)


def test_published_codes_score_is_the_papers_below_rho_1(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    other = sparsify.convert(copy.deepcopy(tiny_llama), RSparse(sparsity=0.5, rho=0.8), tiny_calibration)
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.8, score="published-code"), tiny_calibration)
    assert_same(tiny_llama, other)


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    for (name, layer), (other_name, other_layer) in zip(
        sparse_layers(model).items(), sparse_layers(other).items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(layer.threshold, other_layer.threshold)
        assert layer.rank == other_layer.rank
        for buffer in ("scale", "lr_a", "lr_b"):
            mine, theirs = getattr(layer, buffer), getattr(other_layer, buffer)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@pytest.mark.parametrize("decay", [0.0, 0.3], ids=["flat spectrum", "steep spectrum"])
def test_rho_auto_is_never_worse_than_rho_1(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, sparsity: float, decay: float
) -> None:
    make_steep(tiny_llama, decay)
    plain = sparsify.convert(copy.deepcopy(tiny_llama), RSparse(sparsity=sparsity, rho=1.0), tiny_calibration)
    sparsify.convert(tiny_llama, RSparse(sparsity=sparsity), tiny_calibration)
    without = plain.config.quantization_config.linears
    entries = tiny_llama.config.quantization_config.linears
    for name, entry in entries.items():
        assert entry.error <= without[name].error
        assert (entry.rank > 0) == (entry.error < without[name].error)
    # Where singular values fall fast the low rank must pay, or the choice is not one.
    assert any(entry.rank for entry in entries.values()) or decay == 0.0


def make_steep(model: PreTrainedModel, decay: float) -> None:
    for name, parameter in model.named_parameters():
        if decay and "_proj" in name:
            u, s, vh = torch.linalg.svd(parameter.detach(), full_matrices=False)
            fallen = torch.exp(-decay * torch.arange(len(s)))
            parameter.data = (u * (fallen * s.norm() / fallen.norm())) @ vh


def recipe_of(model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """A different (sparsity, rho) for each linear, in module order."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    shares = [(0.4 + 0.02 * index, 1.0 - 0.02 * index) for index in range(len(names))]
    return {name: {"sparsity": round(s, 4), "rho": round(rho, 4)} for name, (s, rho) in zip(names, shares, strict=True)}


@pytest.mark.parametrize("form", ["mapping", "recipe.json", "recipe.yaml", "recipe.yml", "recipe.npy", "recipe.txt"])
def test_recipes_in_every_form(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, form: str
) -> None:
    recipe = recipe_of(tiny_llama)
    assert list(recipe)[:7] == [
        f"model.layers.0.{name}"
        for name in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    ]
    given: Any = recipe
    if form != "mapping":
        file = tmp_path / form
        given = str(file)
        if form.endswith("json"):
            file.write_text(json.dumps(recipe))
        elif form.endswith(("yaml", "yml")):
            file.write_text(yaml.safe_dump(recipe))
        else:
            # As the public code writes them: rho and sparsity of each linear, one number a line.
            flat = np.array([[entry["rho"], entry["sparsity"]] for entry in recipe.values()]).reshape(-1)
            with file.open("w") as handle:
                np.savetxt(handle, flat)
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, recipe=given), tiny_calibration)
    entries = tiny_llama.config.quantization_config.linears
    assert {name: (e.sparsity, e.rho) for name, e in entries.items()} == {
        name: (entry["sparsity"], entry["rho"]) for name, entry in recipe.items()
    }
    folder = sparsify.save(tiny_llama, tmp_path / "sparse")
    # The shares themselves, not the file that they were read from.
    assert checkpoint.read_config(folder).method_config["recipe"] == recipe
    assert torch.equal(logits(sparsify.load(folder)), logits(tiny_llama))


def test_a_recipe_for_some_linears_leaves_the_rest(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    recipe = {Q: {"sparsity": 0.0, "rho": 1.0}, K: {"sparsity": 0.7, "rho": 0.9}}
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=1.0, recipe=recipe), tiny_calibration)
    for name, entry in tiny_llama.config.quantization_config.linears.items():
        assert entry.sparsity == recipe.get(name, {"sparsity": 0.5})["sparsity"]
    assert float(sparse_layers(tiny_llama)[Q].threshold) == -1.0


GOOD = {"sparsity": 0.5, "rho": 0.9}
BAD_RECIPES: dict[str, tuple[Any, str]] = {
    "unknown linear": ({Q + "x": GOOD}, "Did you mean"),
    "a number as a name": ({3: GOOD}, "3"),
    "no rho": ({Q: {"sparsity": 0.5}}, "'sparsity' and 'rho'"),
    "another key": ({Q: {**GOOD, "alpha": 1}}, "'sparsity' and 'rho'"),
    "an entry that is no mapping": ({Q: [0.5, 0.9]}, "'sparsity' and 'rho'"),
    "sparsity 1": ({Q: {"sparsity": 1.0, "rho": 0.9}}, r"\[0, 1\)"),
    "sparsity in percent": ({Q: {"sparsity": 50, "rho": 0.9}}, r"Did you mean 0\.5"),
    "rho below 0": ({Q: {"sparsity": 0.5, "rho": -0.1}}, r"\[0, 1\]"),
    "rho that is text": ({Q: {"sparsity": 0.5, "rho": "0.9"}}, "must be a number"),
    "rho that is not a number": ({Q: {"sparsity": 0.5, "rho": math.nan}}, r"\[0, 1\]"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes_are_one_clear_error(tiny_llama: PreTrainedModel, tiny_calibration: Calibration, case: str) -> None:
    recipe, message = BAD_RECIPES[case]
    with pytest.raises(SparsifyError, match=message):
        sparsify.convert(tiny_llama, RSparse(sparsity=0.5, recipe=recipe), tiny_calibration)
    assert not sparse_layers(tiny_llama), "nothing was converted"


BAD_FILES = {
    "too few.txt": ("0.9\n0.5\n", "has 2 numbers, this model needs 28"),
    "one more.txt": ("0.5\n" * 29, "has 29 numbers"),
    "outside.txt": ("0.9\n1.5\n" * 14, r"sparsity of .*q_proj in the recipe is 1\.5"),
    "words.txt": ("rho sparsity\n", "not a list of numbers"),
    "empty.txt": ("", "has 0 numbers"),
    "list.json": ("[1, 2]", "must map linear names"),
    "broken.json": ("{", "cannot be read"),
    "broken.yaml": ("a: [", "cannot be read"),
    "empty.yaml": ("", "must map linear names"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_recipe_files_are_one_clear_error(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, name: str
) -> None:
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(SparsifyError, match=message):
        sparsify.convert(tiny_llama, RSparse(sparsity=0.5, recipe=str(tmp_path / name)), tiny_calibration)


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".txt"])
def test_recipe_files_that_are_missing_or_not_text(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"recipe{suffix}"
    with pytest.raises(SparsifyError, match="not a file"):
        sparsify.convert(tiny_llama, RSparse(sparsity=0.5, recipe=str(file)), tiny_calibration)
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SparsifyError, match=r"cannot be read|not a list of numbers"):
        sparsify.convert(tiny_llama, RSparse(sparsity=0.5, recipe=str(file)), tiny_calibration)


def test_no_rank_anywhere_is_an_error(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with pytest.raises(SparsifyError, match="too small for a rank"):
        sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.99), tiny_calibration)
    # Auto weighs what there is room for, plain channels at least.
    sparsify.convert(tiny_llama, RSparse(sparsity=0.9), tiny_calibration)
    assert sparsify.ledger_of(tiny_llama).weighted_sparsity == pytest.approx(0.9)


def test_a_budget_below_the_scales_is_an_error(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    for method in (RSparse(sparsity=0.99), Wina(sparsity=0.99)):
        with pytest.raises(SparsifyError, match="less than its thresholds and scales take"):
            sparsify.convert(tiny_llama, method, tiny_calibration)
        assert not sparse_layers(tiny_llama)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": -0.1}, r"\[0, 1\)"),
        ({"sparsity": "half"}, "must be a number"),
        ({"sparsity": 0.5, "rho": 1.1}, r"\[0, 1\]"),
        ({"sparsity": 0.5, "rho": "atuo"}, "'auto'"),
        ({"sparsity": 0.5, "score": "column_norm"}, "Did you mean 'column-norm'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        RSparse(**options)


def test_rho_0_is_all_low_rank(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, RSparse(sparsity=0.5, rho=0.0), tiny_calibration)
    for layer in sparse_layers(tiny_llama).values():
        assert isinstance(layer, SparseLinear)
        assert (
            layer.rank
            >= math.floor(0.5 * layer.in_features * layer.out_features / (layer.in_features + layer.out_features)) - 2
        )
    assert logits(tiny_llama).isfinite().all()
