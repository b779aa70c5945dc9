"""What a checkpoint's config.json may say beside quantization_config: sizes that can be, and nothing else to load.

Checked before transformers builds the model, whose blocks take memory and time even without weights. Whether widths fit
the weights is `sparsify.preflight`'s to find, from the files' headers. Not covered: what each key means to its model.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sparsify.errors import CheckpointError

# The deepest models have some 130 blocks; each costs a millisecond and 30 KB before any weight is seen.
MOST_BLOCKS = 1024
# Per-block lists, rope factors, token ids: of the longest model that there is, with room.
_LONGEST_LIST = 1 << 16
_LARGEST = 1 << 63
_COUNTS = re.compile(r"(layers|n_layer|experts)$")
# These make from_pretrained read other files, or run other code, than the checkpoint's own weights need.
_REDIRECTS = ("transformers_weights", "fusion_config", "distributed_config")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_model_config(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a config that asks for more than 1024 blocks or experts, for numbers and lists that
    no model has, for other weight files or patches, and for a quantization_config that is not at the top.
    """
    for key in _REDIRECTS:
        if config.get(key) is not None:
            raise CheckpointError(f"config.json has the key {key!r}, which sparsify never writes: refused")
    for path, key, value in _entries(config, ""):
        if key == "quantization_config":
            raise CheckpointError(f"config.json has a quantization_config at {path!r}, it must stand at the top")
        if isinstance(value, list) and len(value) > _LONGEST_LIST:
            raise CheckpointError(f"config.json has {len(value):,} values at {path!r}: no model has so many")
        if type(value) is int and abs(value) >= _LARGEST:
            raise CheckpointError(f"config.json has a number of more than 64 bits at {path!r}")
        if type(value) is int and _COUNTS.search(key) and value > MOST_BLOCKS:
            raise CheckpointError(f"config.json asks for {value:,} at {path!r}, {MOST_BLOCKS:,} at most are built")


def check_implementations(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError where config.json itself names code on the hub to run attention or experts with."""
    for key in _IMPLEMENTATIONS:
        for name in (key, f"_{key}"):
            value = config.get(name)
            names = value.values() if isinstance(value, Mapping) else [value]
            if any("/" in str(found) for found in names):
                raise CheckpointError(
                    f"config.json names code on the hub: {name} is {value!r}; delete the key, or give it to "
                    "from_pretrained yourself if you trust it"
                )


def _entries(config: Mapping[str, Any], place: str) -> Iterator[tuple[str, str, Any]]:
    """Yields (dotted path, key, value) of all that stands in it, but not what the top's quantization_config holds."""
    waiting: list[tuple[str, Any]] = [(place, config)]
    while waiting:
        where, holder = waiting.pop()
        items = holder.items() if isinstance(holder, Mapping) else ((str(i), v) for i, v in enumerate(holder))
        for key, value in items:
            path = f"{where}.{key}" if where else str(key)
            if path == "quantization_config":
                continue
            yield path, str(key), value
            if isinstance(value, Mapping | list):
                waiting.append((path, value))
