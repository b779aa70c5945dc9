"""The keys and values of a transformers DynamicCache in buffers that grow by doubling, written in place.

transformers concatenates every layer's keys and values for every token; here a token writes its own place and the
cache's layers hold views of what is filled. Whatever else happens to the cache (crop, reorder, a longer forward) gives
its layers other tensors: that is seen by identity, and the buffers are filled from them again.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparsify.kernels import library

_ATTRIBUTE = "_sparsify_buffers"
_LEAST_CAPACITY = 256


class CacheBuffers:
    """Buffers [L, B, H, capacity, head_dim] of one cache; tokens `start` to `start + length` of them are filled."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.start = self.length = 0
        self.views: list[tuple[Tensor, Tensor]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "CacheBuffers":
        # A copied cache has tensors of its own: it fills its own buffers when it is used.
        return CacheBuffers()

    def __reduce__(self) -> tuple[Any, ...]:
        return (CacheBuffers, ())

    def holds(self, layers: list[Any]) -> bool:
        return len(layers) == len(self.views) and all(
            layer.keys is key and layer.values is value for layer, (key, value) in zip(layers, self.views, strict=True)
        )

    def adopt(self, layers: list[Any]) -> None:
        """Copies what the layers hold, with room for more."""
        first = layers[0].keys
        self.start, self.length = 0, first.shape[-2]
        batch, heads, length, size = first.shape
        capacity = _capacity(length)
        shape = (len(layers), batch, heads, capacity, size)
        self.keys = torch.empty(shape, dtype=first.dtype)
        self.values = torch.empty(shape, dtype=first.dtype)
        for index, layer in enumerate(layers):
            self.keys[index, :, :, :length] = layer.keys
            self.values[index, :, :, :length] = layer.values

    def make_room(self) -> None:
        """Makes sure that one more token fits."""
        assert self.keys is not None
        assert self.values is not None
        if self.start + self.length < self.keys.shape[3]:
            return
        filled = slice(self.start, self.start + self.length)
        shape = list(self.keys.shape)
        shape[3] = _capacity(self.length)
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = torch.empty(shape, dtype=old.dtype)
            new[:, :, :, : self.length] = old[:, :, :, filled]
            setattr(self, name, new)
        self.start = 0

    def point(self, blocks: Any) -> None:
        """Sets the cache pointers of the library's blocks."""
        assert self.keys is not None
        assert self.values is not None
        layer, sequence, head, token, _ = self.keys.stride()
        size = self.keys.element_size()
        keys, values = (
            self.keys.data_ptr() + self.start * token * size,
            self.values.data_ptr() + self.start * token * size,
        )
        for index, block in enumerate(blocks):
            block.keys, block.values = keys + index * layer * size, values + index * layer * size
            block.sequence_stride, block.head_stride, block.length = sequence, head, self.length

    def append(self, layers: list[Any], window: int | None) -> None:
        """Gives the layers views that hold the token just written; a sliding window keeps its last window − 1."""
        assert self.keys is not None
        assert self.values is not None
        self.length += 1
        if window is not None and self.length > window - 1:
            self.start, self.length = self.start + 1, window - 1
        keys = self.keys.narrow(3, self.start, self.length).unbind(0)
        values = self.values.narrow(3, self.start, self.length).unbind(0)
        self.views = list(zip(keys, values, strict=True))
        for layer, (key, value) in zip(layers, self.views, strict=True):
            layer.keys, layer.values = key, value
            if window is not None:
                layer.cumulative_length += 1


def _capacity(length: int) -> int:
    return max(_LEAST_CAPACITY, 2 * length)


def usable(cache: object, windows: list[int | None], batch: int, dtype: torch.dtype) -> list[Any] | None:
    """Returns the layers of a cache that the native step can go on with; None where it is another kind, or empty.

    windows: the sliding window of each block, None where it attends to everything.
    """
    if type(cache) is not DynamicCache or len(cache.layers) != len(windows):
        return None
    layers: list[Any] = list(cache.layers)
    if len(set(windows)) != 1 or [getattr(layer, "sliding_window", None) for layer in layers] != windows:
        return None
    kinds = {type(layer) for layer in layers}
    if kinds not in ({DynamicLayer}, {DynamicSlidingWindowLayer}) or not all(layer.is_initialized for layer in layers):
        return None
    if kinds == {DynamicSlidingWindowLayer} and any(layer.record_past for layer in layers):
        return None
    first = layers[0].keys
    shapes = {(layer.keys.shape, layer.values.shape) for layer in layers}
    if (
        first.dim() != 4
        or not first.shape[2] > 0
        or first.shape[0] != batch
        or first.dtype != dtype
        or len(shapes) != 1
    ):
        return None
    return layers if first.device.type == "cpu" else None


def buffers_of(cache: Any) -> CacheBuffers:
    """Returns the buffers of a cache, made on the first call and kept with it."""
    found = getattr(cache, _ATTRIBUTE, None)
    if found is None:
        found = CacheBuffers()
        setattr(cache, _ATTRIBUTE, found)
    return found


# Tokens of one step: the native library's limit.
MOST_SEQUENCES = library.MAX_TOKENS
