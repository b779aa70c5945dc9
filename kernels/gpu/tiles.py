"""How a launch is cut up: tiles from a table tuned on the device, or a rule where there is no table.

A table is a JSON file named after the device, shipped in `tuned/` or made by `sparsify tune`. Nothing is tuned or timed
while a model runs: a launch of the same shape always takes the same tile.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import SparsifyError

# A folder or file of the user's own tables, looked at before the shipped ones.
TABLE_VARIABLE = "SPARSIFY_TILES"
# Up to so many tokens share one read of their union of channels.
MOST_TOKENS = 8
_SHIPPED = Path(__file__).parent / "tuned"
_MOST_SPLITS = 32
# Programs for each multiprocessor that the rule aims at, and the fewest blocks of channels in a program.
_WAVES, _LEAST_BLOCKS = 4, 4


@dataclass(frozen=True)
class Tile:
    """block_n columns and block_k channels at once, channels in `splits` parts, warps and pipeline stages."""

    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        powers = {"block_n": 2048, "block_k": 256, "warps": 16}
        for field in fields(self):
            value, most = getattr(self, field.name), powers.get(field.name, _MOST_SPLITS)
            if type(value) is not int or not 1 <= value <= most:
                raise SparsifyError(f"{field.name} is {value!r}, it must be a whole number from 1 to {most}")
            if field.name in powers and value & (value - 1):
                raise SparsifyError(f"{field.name} is {value}, it must be a power of two")


@dataclass(frozen=True)
class Table:
    """What was tuned on one device. indexed_below: the density under which lists of channels are faster than masks."""

    device: str
    indexed_below: float
    tiles: Mapping[str, Tile]


# Between the masked form's limit by instructions (about 84% of sparsity on an H200) and the cost of a list.
RULES = Table(device="any", indexed_below=0.25, tiles={})


def key_of(inputs: int, outputs: Sequence[int], dtype: torch.dtype, tokens: int, *, indexed: bool) -> str:
    """Returns the name of a launch in a table: its shape, dtype, number of tokens (1, 2, 4 or 8) and form."""
    bucket = 1 << (tokens - 1).bit_length()
    form = "indexed" if indexed else "masked"
    return f"{inputs}x{'+'.join(map(str, outputs))} {str(dtype).removeprefix('torch.')} {bucket} {form}"


def tile_for(
    inputs: int,
    outputs: Sequence[int],
    dtype: torch.dtype,
    tokens: int,
    *,
    indexed: bool,
    multiprocessors: int,
    table: Table = RULES,
) -> Tile:
    """Returns the table's tile for a site of linears [N_l, inputs], or the rule's where it has none."""
    found = table.tiles.get(key_of(inputs, outputs, dtype, tokens, indexed=indexed))
    return found or ruled_tile(inputs, outputs, dtype, tokens, indexed=indexed, multiprocessors=multiprocessors)


def ruled_tile(
    inputs: int, outputs: Sequence[int], dtype: torch.dtype, tokens: int, *, multiprocessors: int, indexed: bool = False
) -> Tile:
    """Returns a tile by rule: 512-byte rows where that leaves enough programs, shorter ones for small outputs."""
    narrow = dtype.itemsize <= 2
    block_k = 16 if tokens == 1 else 32
    if not narrow:
        block_k //= 2 if tokens == 1 else 1
    widest = 256 if tokens == 1 else 128
    target = _WAVES * multiprocessors
    for block_n in (widest, widest // 2, widest // 4):
        blocks = sum(-(-n // block_n) for n in outputs)
        if blocks * 16 >= target:
            break
    most = max(1, inputs // (_LEAST_BLOCKS * block_k))
    splits = max(1, min(-(-target // blocks), 16, most))
    # What is on its way from memory at once: at least 20 KB a program.
    stages = 4 if block_n * block_k * dtype.itemsize >= 8192 else 6
    if indexed and tokens > 1:
        # The way from the list over the inputs to the weights takes stages of its own.
        stages += 3
    return Tile(block_n=block_n, block_k=block_k, splits=splits, warps=4, stages=stages)


@cache
def table_of(device: torch.device) -> Table:
    """Returns the table of a device, RULES where neither the user nor this package has one for it.

    Raises SparsifyError for a table that is not one.
    """
    if device.type != "cuda":
        return RULES
    name = torch.cuda.get_device_name(device)
    given = os.environ.get(TABLE_VARIABLE)
    paths = [Path(given) / file_name(name) if Path(given).is_dir() else Path(given)] if given else []
    if given and not paths[0].is_file():
        raise SparsifyError(f"{TABLE_VARIABLE}={given}: no table for {name} there; `sparsify tune` makes one")
    for path in (*paths, _SHIPPED / file_name(name)):
        if path.is_file():
            return read_table(path)
    return RULES


def file_name(device: str) -> str:
    """Returns the name of a device's table: "NVIDIA H200" is nvidia-h200.json."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split()) + ".json"


def read_table(path: Path) -> Table:
    """Reads a table. Raises SparsifyError for one that is damaged or not a table."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        below = data["indexed_below"]
        if type(below) not in (int, float) or not 0 <= below <= 1:
            raise SparsifyError(f"indexed_below is {below!r}, it must be a number in [0, 1]")
        return Table(str(data["device"]), float(below), {name: Tile(*tile) for name, tile in data["tiles"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SparsifyError) as error:
        raise SparsifyError(f"{path} is no table of tiles: {error}; make it again with `sparsify tune`") from error


def table_document(table: Table, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table as what its file holds, with what else is known about it."""
    tiles = {name: list(astuple(tile)) for name, tile in sorted(table.tiles.items())}
    return {"device": table.device, **about, "indexed_below": table.indexed_below, "tiles": tiles}
