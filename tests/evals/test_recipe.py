"""Recipes: every one that is shipped means something to this version, and a file that does not is refused."""

from pathlib import Path

import pytest

from sparsify import text
from sparsify.errors import SparsifyError
from sparsify.evals import recipe as module
from sparsify.evals.compare_labels import parse_allocation, parse_method
from sparsify.evals.perplexity import check_protocol
from sparsify.evals.recipe import Recipe, read_recipe, recipe_names
from sparsify.models import ALIASES, resolve_model


def test_the_published_settings_are_there() -> None:
    assert recipe_names() == ["llama-2-7b-wikitext2", "llama-3-8b-wikitext2", "mistral-7b-wikitext2"]


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_resolve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(name)
    assert recipe.about
    assert recipe.model is not None
    assert resolve_model(recipe.model) == ALIASES[recipe.model]
    for label in recipe.methods:
        parse_allocation(label)
        for sparsity in recipe.sparsities:
            assert parse_method(label, sparsity).sparsity == sparsity
    for protocol in recipe.protocols:
        check_protocol(protocol)
    settings = recipe.settings()
    assert (settings.seq_len, settings.stride, settings.limit, settings.generation) == (2048, None, None, None)
    asked: list[str] = []
    monkeypatch.setattr(text, "_hub_rows", lambda spec: asked.append(spec) or ["a row"])
    assert recipe.text is not None
    for spec in (recipe.calibration, recipe.text):
        assert text.read_text(spec).documents == ["a row"]
    # Calibrated on the training split, evaluated on the test split.
    assert [spec.rpartition(":")[2] for spec in asked] == ["train", "test"]


def test_flags_win_over_a_recipe() -> None:
    recipe = read_recipe("llama-2-7b-wikitext2").updated({"model": "reference", "generation": 4}, source="flags")
    assert (recipe.model, recipe.seq_len) == ("reference", 2048)
    check = recipe.settings(device="cpu").generation
    assert check is not None
    assert (check.prompts, check.new_tokens) == (4, 128)


def test_a_bad_recipe_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    (tmp_path / "mine.yaml").write_text("modell: reference\n")
    with pytest.raises(SparsifyError, match=r"recipe mine: unknown key 'modell'.*Did you mean 'model'"):
        read_recipe("mine")
    with pytest.raises(SparsifyError, match=r"unknown recipe 'min': there are mine\. Did you mean 'mine'"):
        read_recipe("min")
    with pytest.raises(SparsifyError, match="seq_len"):
        Recipe().updated({"seq_len": "long"}, source="flags")
