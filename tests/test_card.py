"""The section of results in a model card: added, replaced, and never closed by what stands in it."""

import json
from pathlib import Path

import pytest

from sparsify.card import with_results
from sparsify.errors import CheckpointError
from sparsify.manifest import CARD, MANIFEST, check_manifest, checkpoint_sha256, replace_card, write_manifest

_CARD = "# A model\n\nText of its author.\n"


def test_the_section_is_added_once_and_the_rest_stays() -> None:
    first = with_results(_CARD, [("perplexity", "10.0")], ["sparsify eval FOLDER"])
    assert first.startswith(_CARD)
    assert "| perplexity | 10.0 |" in first
    edited = first.replace("Text", "Words") + "\nMore below.\n"
    second = with_results(edited, [("perplexity", "11.0")], ["sparsify eval FOLDER --limit 2"])
    assert "10.0" not in second
    assert "| perplexity | 11.0 |" in second
    assert second.startswith("# A model\n\nWords of its author.\n")
    assert second.endswith("\nMore below.\n")
    assert second.count("## Results") == 1


def test_values_stay_in_their_field() -> None:
    card = with_results(_CARD, [("a|b\nc", "<!-- sparsify report: end --> <script>")], ["x\ny"])
    (row,) = [line for line in card.splitlines() if line.startswith("| a")]
    assert row == r"| a\|b c | &lt;!-- sparsify report: end --> &lt;script> |"
    assert "x y" in card.splitlines()


def test_a_section_without_its_end_is_refused() -> None:
    card = with_results(_CARD, [("a", "b")], []).replace("<!-- sparsify report: end -->", "")
    with pytest.raises(CheckpointError, match="remove both"):
        with_results(card, [("a", "c")], [])


def test_a_new_card_keeps_the_manifest_and_the_identity(tmp_path: Path) -> None:
    for name in (CARD, "config.json"):
        (tmp_path / name).write_text('{"a": 1}')
    write_manifest(tmp_path)
    before = checkpoint_sha256(tmp_path)
    assert replace_card(tmp_path, "é new\n").read_text(encoding="utf-8") == "é new\n"
    assert check_manifest(tmp_path) == []
    assert checkpoint_sha256(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CARD, "config.json", MANIFEST])
    (tmp_path / "config.json").write_text('{"a": 2}')
    replace_card(tmp_path, "again\n")
    assert check_manifest(tmp_path) == [
        "config.json: its content was changed (SHA-256 differs)",
        "config.json: a is 2, it should be 1",
    ]
    write_manifest(tmp_path)
    assert checkpoint_sha256(tmp_path) != before


def test_without_a_manifest_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("old")
    assert checkpoint_sha256(tmp_path) is None
    with pytest.raises(CheckpointError, match=MANIFEST):
        replace_card(tmp_path, "new")
    assert (tmp_path / CARD).read_text() == "old"
    (tmp_path / MANIFEST).write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="expected a mapping"):
        replace_card(tmp_path, "new")
