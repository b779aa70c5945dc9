"""The settings of a conversion: types, unknown names, the order of sources, and the round trip through YAML."""

import inspect
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from sparsify.cli.convert import convert
from sparsify.cli.settings import ConvertSettings, parse_rho
from sparsify.errors import SparsifyError

CALL_ONLY = {"config", "dry_run", "format", "save", "stream", "resume"}


def test_every_flag_is_a_setting() -> None:
    flags = set(inspect.signature(convert).parameters) - CALL_ONLY
    assert flags == {field.name for field in fields(ConvertSettings)}


@pytest.mark.parametrize("rho", [None, "auto", 0.95, 1])
def test_yaml_round_trip(tmp_path: Path, rho: float | str | None) -> None:
    settings = ConvertSettings(model="a/b", out="ü", sparsity=0.25, rho=rho, trust_remote_code=True)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(asdict(settings)), encoding="utf-8")
    assert ConvertSettings.from_yaml(path) == settings


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("sparsity: 0.25\nsequences: 4\n")
    settings = ConvertSettings.from_yaml(path).updated({"sparsity": 0.5}, source="flags")
    assert (settings.sparsity, settings.sequences, settings.seq_len) == (0.5, 4, ConvertSettings.seq_len)


def test_a_whole_number_is_a_number() -> None:
    assert ConvertSettings().updated({"sparsity": 0}, source="file").sparsity == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparsty: 0.5", ["sparsty", "Did you mean 'sparsity'"]),
        ("seq-len: 64", ["seq-len", "Did you mean 'seq_len'"]),
        ("3: 4", ["unknown key 3"]),
        ("sparsity: high", ["sparsity", "high"]),
        ("sparsity: true", ["sparsity", "True"]),
        ("sequences: 1.5", ["sequences", "1.5"]),
        ("dtype: int8", ["dtype", "int8", "bfloat16"]),
        ("- 1\n- 2", ["list"]),
        ("a: [1", ["not YAML", "line"]),
        ("model: !!python/object/apply:os.getcwd []", ["not YAML"]),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SparsifyError) as caught:
        ConvertSettings.from_yaml(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"model: caf\xe9\n")
    for path, word in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory"), (latin, "UTF-8")):
        with pytest.raises(SparsifyError, match=word):
            ConvertSettings.from_yaml(path)


@pytest.mark.parametrize(("text", "value"), [(None, None), ("0.5", 0.5), ("1", 1.0), ("auto", "auto"), ("x", "x")])
def test_parse_rho(text: str | None, value: float | str | None) -> None:
    assert parse_rho(text) == value
