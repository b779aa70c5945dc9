"""The byte ledger of a converted model: the weight bytes that one token touches, linear by linear.

Nominal sparsity is what was asked for; weighted sparsity is what the ledger holds, all factors, scales and thresholds
counted; realised sparsity is the same ledger with the densities that some text really had (`with_densities`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparsify.budget import LinearShape
from sparsify.config import SparsifyConfig
from sparsify.errors import CheckpointError
from sparsify.runtime import sparse_layers
from sparsify.short_forward import is_expert_weight
from sparsify.strict import from_mapping
from sparsify.targets import decoder_of

_DERIVED = ("weighted_sparsity", "model_sparsity", "dense_bytes_per_token", "touched_bytes_per_token")
_MOST = 1 << 48


@dataclass(frozen=True)
class LinearBytes:
    """One linear's bytes for one token; density is the share of channels used. Biases are touched dense or sparse.

    rotation_bytes: its part of the rotation that the linears of its input site share.
    """

    name: str
    outputs: int
    inputs: int
    element_size: int
    rank: int
    density: float
    scaled: bool
    compensated: bool = False
    rotation_bytes: float = 0.0

    @property
    def shape(self) -> LinearShape:
        return LinearShape(self.outputs, self.inputs, self.element_size)

    @property
    def dense_bytes(self) -> int:
        return self.shape.dense_bytes

    @property
    def channel_bytes(self) -> float:
        return self.density * self.dense_bytes

    @property
    def low_rank_bytes(self) -> int:
        return self.shape.low_rank_bytes(self.rank)

    @property
    def overhead_bytes(self) -> float:
        """Threshold, score scales, compensation and rotation; none in a linear that keeps every channel."""
        if self.density >= 1.0 and not self.rank and not self.compensated:
            return 0
        own = self.shape.overhead_bytes(scaled=self.scaled, compensated=self.compensated)
        return own + self.rotation_bytes

    @property
    def touched_bytes(self) -> float:
        return self.channel_bytes + self.low_rank_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Ledger:
    """All linears of a model, and the rest of the weights that every token touches either way.

    rest_bytes: biases, norms, head, one row of the input embedding, the share of experts that a token visits.
    """

    nominal_sparsity: float
    linears: tuple[LinearBytes, ...]
    rest_bytes: int
    left_dense: tuple[str, ...]

    @property
    def dense_bytes(self) -> int:
        """Weight bytes of the converted linears, as the dense model reads them for one token."""
        return sum(linear.dense_bytes for linear in self.linears)

    @property
    def touched_bytes(self) -> float:
        return sum(linear.touched_bytes for linear in self.linears)

    @property
    def weighted_sparsity(self) -> float:
        """1 − touched/dense bytes over the converted linears."""
        return 1.0 - self.touched_bytes / self.dense_bytes

    @property
    def model_sparsity(self) -> float:
        """1 − touched/dense bytes over everything that a token touches in the model."""
        return 1.0 - (self.touched_bytes + self.rest_bytes) / (self.dense_bytes + self.rest_bytes)

    def with_densities(self, densities: Mapping[str, float]) -> "Ledger":
        """Returns the ledger with measured densities, name by name; linears without one keep theirs."""
        linears = tuple(replace(linear, density=densities.get(linear.name, linear.density)) for linear in self.linears)
        return replace(self, linears=linears)

    def to_dict(self) -> dict[str, Any]:
        return {
            "nominal_sparsity": self.nominal_sparsity,
            "weighted_sparsity": self.weighted_sparsity,
            "model_sparsity": self.model_sparsity,
            "dense_bytes_per_token": self.dense_bytes,
            "touched_bytes_per_token": self.touched_bytes,
            "rest_bytes_per_token": self.rest_bytes,
            "left_dense": list(self.left_dense),
            "linears": [
                # Readers that do not know what a linear does not have refuse the keys.
                {k: v for k, v in asdict(linear).items() if k not in ("compensated", "rotation_bytes") or v}
                for linear in self.linears
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Ledger":
        """Reads what to_dict wrote. Raises CheckpointError where it is not that."""
        where = "the ledger"
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{where} is not one that sparsify wrote: it is a {type(data).__name__}")
        # What to_dict works out from the rest is not read.
        read = {key: value for key, value in data.items() if key not in _DERIVED}
        raw = from_mapping(_Stored, read, where=where, error=CheckpointError)
        if not raw.linears:
            raise CheckpointError(f"{where} is not one that sparsify wrote: it names no linears")
        linears = tuple(_linear_bytes(entry, where) for entry in raw.linears)
        _check_range(where, "nominal_sparsity", raw.nominal_sparsity, 0, 1)
        _check_range(where, "rest_bytes_per_token", raw.rest_bytes_per_token, 0, _MOST)
        return cls(raw.nominal_sparsity, linears, raw.rest_bytes_per_token, tuple(raw.left_dense))


@dataclass(frozen=True)
class _Stored:
    nominal_sparsity: float
    linears: list[Any]
    rest_bytes_per_token: int
    left_dense: list[str]


def _linear_bytes(data: object, where: str) -> LinearBytes:
    linear = from_mapping(LinearBytes, data, where=where, error=CheckpointError)
    for key, least, most in (
        ("outputs", 1, _MOST), ("inputs", 1, _MOST), ("element_size", 1, 16), ("rank", 0, _MOST), ("density", 0, 1),
        ("rotation_bytes", 0, _MOST),
    ):  # fmt: skip
        _check_range(f"{where}: {linear.name!r}", key, getattr(linear, key), least, most)
    return linear


def _check_range(where: str, key: str, value: float, least: int, most: int) -> None:
    if not least <= value <= most:
        raise CheckpointError(f"{where}: {key} is {value}, it must be in [{least}, {most:g}]")


def ledger_of(model: PreTrainedModel) -> Ledger:
    """Returns the ledger of a converted model, from its layers and its configuration."""
    config = model.config.quantization_config
    assert isinstance(config, SparsifyConfig)
    linears, layers = [], sparse_layers(model)
    turned: Counter[str] = Counter()
    for name, layer in layers.items():
        turned[config.linears[name].rotation or ""] += layer.sparse_out
    for name, layer in layers.items():
        entry = config.linears[name]
        size = layer.weight.element_size()
        site_outputs = turned[entry.rotation] if entry.rotation is not None else 0
        shape = LinearShape(layer.sparse_out, layer.sparse_in, size, site_outputs)
        linears.append(
            LinearBytes(
                name=name,
                outputs=layer.sparse_out,
                inputs=layer.sparse_in,
                element_size=size,
                rank=layer.rank,
                density=entry.density,
                scaled=layer.scale is not None,
                compensated=layer.sparse_bias is not None,
                rotation_bytes=shape.rotation_bytes,
            )
        )
    return Ledger(config.sparsity, tuple(linears), rest_bytes(model), tuple(config.left_dense))


def rest_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes that every token touches outside of converted linears; all there are in a dense model."""
    converted = {id(layer.weight) for layer in sparse_layers(model).values()}
    text = model.config.get_text_config(decoder=True)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    counted = {id(head.weight)} if head is not None else set()
    total = head.weight.numel() * head.weight.element_size() if head is not None else 0
    # Not a vision tower, which no token of text touches.
    for module in [*decoder_of(model).modules(), *([head] if head is not None else [])]:
        for parameter in module.parameters(recurse=False):
            if id(parameter) in converted or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            size = parameter.numel() * parameter.element_size()
            if isinstance(module, nn.Embedding):
                size //= module.num_embeddings
            elif is_expert_weight(module, parameter):
                experts = parameter.shape[0]
                size = size * int(getattr(text, "num_experts_per_tok", None) or experts) // experts
            total += size
    # The tied head is read whole; its one row as the input embedding is not counted again.
    return total
