"""Tiles: the rule's limits, names in tables, and tables that are read, refused or written."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.errors import SparsifyError
from sparsify.kernels.gpu import tiles
from sparsify.kernels.gpu.tiles import (
    MOST_TOKENS,
    RULES,
    TABLE_VARIABLE,
    Table,
    Tile,
    file_name,
    key_of,
    read_table,
    ruled_tile,
    table_document,
    table_of,
    tile_for,
)

BF16 = torch.bfloat16
TABLE = Table("NVIDIA Test 9", 0.3, {"b": Tile(128, 16, 3, 4, 5), "a": Tile(64, 32, 1, 2, 3)})
# Sites of models from 60 million to 70 billion parameters, and sizes at the borders.
SITES = [
    (1, (1,)), (15, (3, 5)), (64, (64,)), (768, (768, 768, 768)), (2048, (2048, 256, 256)), (4096, (14336, 14336)),
    (14336, (4096,)), (8192, (8192, 1024, 1024)), (28672, (8192,)), (4096, (128256,)),
]  # fmt: skip


# ---- the rule ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_rule_keeps_its_limits(dtype: torch.dtype) -> None:
    for (inputs, outputs), tokens, multiprocessors in itertools.product(SITES, (1, 2, 8), (1, 16, 108, 132, 304)):
        tile = ruled_tile(inputs, outputs, dtype, tokens, multiprocessors=multiprocessors)
        case = (inputs, outputs, tokens, multiprocessors, tile)
        # Tensor cores take blocks of 16 channels and more.
        assert tile.block_k >= (8 if tokens == 1 else 16), case
        # 2-D sums of one token, and the sums and weights of several, fit the registers of 4 warps.
        assert tile.block_n * tile.block_k <= 4096, case
        assert tile.warps == 4, case
        assert 1 <= tile.splits <= 16, case
        # No part is without channels when all are kept.
        assert tile.splits == 1 or tile.splits * tile.block_k * 4 <= inputs, case
        # What is in flight at once fits a program's share of shared memory, and is enough to hide the memory's delay.
        flight = tile.stages * tile.block_n * tile.block_k * dtype.itemsize
        assert flight <= 64 * 1024, case


def test_the_rule_splits_for_more_programs_and_narrows_for_small_outputs() -> None:
    few, many = (ruled_tile(4096, (4096,), BF16, 1, multiprocessors=n) for n in (16, 132))
    assert many.splits > few.splits
    wide = ruled_tile(4096, (14336, 14336), BF16, 1, multiprocessors=132)
    small = ruled_tile(4096, (1024,), BF16, 1, multiprocessors=132)
    assert wide.block_n > small.block_n
    # A row of a block is at least a sector of memory wide.
    assert small.block_n * 2 >= 32


def test_a_launch_of_the_same_shape_takes_the_same_tile() -> None:
    made = [ruled_tile(4096, (4096, 1024, 1024), BF16, 1, multiprocessors=132) for _ in range(2)]
    assert made[0] == made[1]
    for tokens in range(2, MOST_TOKENS + 1):
        assert ruled_tile(4096, (4096,), BF16, tokens, multiprocessors=132) == ruled_tile(
            4096, (4096,), BF16, 8, multiprocessors=132
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"block_n": 4096}, "block_n is 4096, it must be a whole number from 1 to 2048"),
        ({"block_n": 96}, "block_n is 96, it must be a power of two"),
        ({"block_k": 512}, "block_k is 512, it must be a whole number from 1 to 256"),
        ({"block_k": 0}, "block_k is 0, it must be a whole number from 1 to 256"),
        ({"splits": 33}, "splits is 33, it must be a whole number from 1 to 32"),
        ({"splits": -1}, "splits is -1, it must be a whole number from 1 to 32"),
        ({"warps": 3}, "warps is 3, it must be a power of two"),
        ({"warps": 32}, "warps is 32, it must be a whole number from 1 to 16"),
        ({"stages": 2.0}, "stages is 2.0, it must be a whole number from 1 to 32"),
        ({"stages": True}, "stages is True, it must be a whole number from 1 to 32"),
        ({"stages": "4"}, "stages is '4', it must be a whole number from 1 to 32"),
    ],
    ids=str,
)
def test_tiles_that_no_kernel_can_take(bad: dict[str, Any], message: str) -> None:
    good = {"block_n": 128, "block_k": 16, "splits": 2, "warps": 4, "stages": 3}
    with pytest.raises(SparsifyError) as error:
        Tile(**(good | bad))
    assert message in str(error.value)


# ---- names ----


def test_names_of_launches() -> None:
    assert key_of(4096, (4096, 1024, 1024), BF16, 1, indexed=False) == "4096x4096+1024+1024 bfloat16 1 masked"
    assert key_of(14336, (4096,), torch.float32, 3, indexed=True) == "14336x4096 float32 4 indexed"
    buckets = [key_of(1, (1,), BF16, tokens, indexed=False).split()[2] for tokens in range(1, 9)]
    assert buckets == ["1", "2", "4", "4", "8", "8", "8", "8"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "nvidia-h200.json"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3.json"),
        ("Tesla T4", "tesla-t4.json"),
        (" AMD Instinct(TM)  MI300X / OAM ", "amd-instinct-tm-mi300x-oam.json"),
        ("../../etc", "etc.json"),
    ],
)
def test_file_names(device: str, name: str) -> None:
    assert file_name(device) == name


# ---- tables ----


def test_the_table_is_asked_first() -> None:
    tile = Tile(32, 64, 2, 8, 2)
    table = Table("any", 0.25, {key_of(4096, (4096,), BF16, 1, indexed=True): tile})
    rule = ruled_tile(4096, (4096,), BF16, 1, multiprocessors=132)
    assert tile != rule
    assert tile_for(4096, (4096,), BF16, 1, indexed=True, multiprocessors=132, table=table) == tile
    assert tile_for(4096, (4096,), BF16, 1, indexed=False, multiprocessors=132, table=table) == rule
    assert tile_for(4096, (4096,), BF16, 1, indexed=True, multiprocessors=132) == rule


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    document = table_document(TABLE, {"triton": "3.7.1", "measured": [1, 2]})
    assert list(document) == ["device", "triton", "measured", "indexed_below", "tiles"]
    assert list(document["tiles"]) == ["a", "b"]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(document))
    assert read_table(path) == TABLE


GOOD = {"device": "x", "indexed_below": 0.2, "tiles": {"a": [64, 32, 1, 2, 3]}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("\x00\x01", "Expecting value"),
        ("[]", "list indices"),
        ("null", "NoneType"),
        ({"device": "x", "tiles": {}}, "indexed_below"),
        (GOOD | {"indexed_below": 1.5}, "indexed_below is 1.5, it must be a number in [0, 1]"),
        (GOOD | {"indexed_below": True}, "indexed_below is True"),
        (GOOD | {"indexed_below": "0.2"}, "indexed_below is '0.2'"),
        (GOOD | {"indexed_below": float("nan")}, "indexed_below is nan"),
        (GOOD | {"tiles": []}, "items"),
        (GOOD | {"tiles": {"a": 5}}, "int"),
        (GOOD | {"tiles": {"a": [64, 32, 1, 2]}}, "stages"),
        (GOOD | {"tiles": {"a": [64, 32, 1, 2, 3, 4]}}, "arguments"),
        (GOOD | {"tiles": {"a": [65, 32, 1, 2, 3]}}, "block_n is 65, it must be a power of two"),
        (GOOD | {"tiles": {"a": [64, 32, None, 2, 3]}}, "splits is None"),
    ],
    ids=str,
)
def test_damaged_tables_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    """With the file's name, what is wrong in it, and what to do."""
    path = tmp_path / "nvidia-test.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SparsifyError) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path} is no table of tiles: ")
    assert words in str(error.value)
    assert str(error.value).endswith("; make it again with `sparsify tune`")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SparsifyError, match="is no table of tiles"):
        read_table(path)


def test_shipped_tables_are_readable() -> None:
    """And named after their devices, or nobody would find them."""
    for path in (Path(tiles.__file__).parent / "tuned").glob("*.json"):
        assert file_name(read_table(path).device) == path.name


# ---- which table ----


@pytest.fixture
def named_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device called "NVIDIA Test 9", that need not be there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: TABLE.device)
    monkeypatch.delenv(TABLE_VARIABLE, raising=False)
    table_of.cache_clear()
    yield torch.device("cuda", 0)
    table_of.cache_clear()


def write(folder: Path, name: str, table: Table = TABLE) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(table_document(table, {})))
    return path


def test_devices_without_a_table_take_the_rule(named_device: torch.device) -> None:
    assert table_of(named_device) is RULES
    assert table_of(torch.device("cpu")) is RULES
    assert table_of(torch.device("meta")) is RULES


def test_shipped_tables_are_found_by_name(
    named_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_SHIPPED", tmp_path)
    write(tmp_path, "nvidia-test-9.json")
    assert table_of(named_device) == TABLE


def test_the_users_table_goes_before_the_shipped_one(
    named_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given as a file of any name, or as a folder of them."""
    monkeypatch.setattr(tiles, "_SHIPPED", tmp_path / "shipped")
    write(tmp_path / "shipped", "nvidia-test-9.json", RULES)
    file = write(tmp_path / "own", "nvidia-test-9.json")
    for given in (file, file.parent):
        monkeypatch.setenv(TABLE_VARIABLE, str(given))
        table_of.cache_clear()
        assert table_of(named_device) == TABLE


@pytest.mark.parametrize("given", ["missing.json", "."])
def test_a_users_table_that_is_not_there_is_an_error(
    given: str, named_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / given
    monkeypatch.setenv(TABLE_VARIABLE, str(path))
    with pytest.raises(SparsifyError) as error:
        table_of(named_device)
    assert str(error.value) == f"SPARSIFY_TILES={path}: no table for NVIDIA Test 9 there; `sparsify tune` makes one"


def test_a_damaged_users_table_is_an_error(
    named_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}")
    monkeypatch.setenv(TABLE_VARIABLE, str(path))
    with pytest.raises(SparsifyError, match=r"mine\.json is no table of tiles: 'indexed_below'"):
        table_of(named_device)


def test_a_cpu_needs_no_table_whatever_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TABLE_VARIABLE, "/nowhere")
    table_of.cache_clear()
    assert table_of(torch.device("cpu")) is RULES
