"""The `quantization_config` of a converted checkpoint: strict and versioned, all that loading needs to know."""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsify.errors import CheckpointError
from sparsify.neuron_cut import Mlp, NeuronCut, NeuronCuts
from sparsify.runtime import Prefill
from sparsify.strict import from_mapping
from sparsify.token_cut import TokenCut

QUANT_METHOD = "sparsify"
SCHEMA_VERSION = 1
# Seven in each of 1,024 blocks, and some.
_MOST_LINEARS = 10_000
_LARGEST = 1 << 48
_NAME = re.compile(r"[A-Za-z][\w.+-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class LinearEntry:
    """One converted linear: how its budget was spent and what that cost on calibration text.

    error is the mean of ‖y − ŷ‖² / ‖y‖² over tokens, on dense inputs; density is the calibrated share of channels a
    token uses; energy_ranks are the ranks that hold 50, 90 and 99% of ‖W‖², where singular values were looked at, None
    for one beyond those that a randomised SVD computed; low_rank_error is ‖W − L‖/‖W‖ where L is of a randomised one;
    cut says how each token's channels are cut where that is not by a fixed threshold (sparsify.token_cut); compensated
    is true where sparse forwards have a bias of their own, which makes up for the mean of what they drop;
    rotation names the linear of its site that stores the Q whose Qᵀx is cut in the place of x.
    """

    sparsity: float
    rho: float
    rank: int
    scaled: bool
    density: float
    error: float
    energy_ranks: list[int | None] | None = None
    cut: TokenCut | None = None
    compensated: bool | None = None
    rotation: str | None = None
    low_rank_error: float | None = None


@dataclass(frozen=True)
class CalibrationEntry:
    """What the thresholds were calibrated on; sha256 is of the token ids."""

    source: str
    sequences: int
    seq_len: int
    sha256: str


@dataclass(frozen=True)
class _NeuronSchema:
    cut: NeuronCut
    mlps: list[Any]


@dataclass(frozen=True)
class _Schema:
    quant_method: str
    schema_version: int
    sparsify_version: str
    method: str
    method_config: dict[str, Any]
    prefill: str
    sites: list[list[str]]
    left_dense: list[str]
    calibration: dict[str, Any]
    linears: dict[str, Any]
    allocation: str = "uniform"
    neurons: dict[str, Any] | None = None
    rotated: bool = False


class SparsifyConfig(QuantizationConfigMixin):
    """What transformers keeps as `model.config.quantization_config` and writes into config.json.

    linears: LinearEntry by module name, in module order; sites: the names that share an input; allocation: how the
    budget was spent over the linears; neurons: the MLPs whose neurons are chosen, None where input channels are;
    rotated: whether the residual stream was turned first (sparsify.rotation).
    """

    def __init__(
        self,
        *,
        sparsify_version: str,
        method: str,
        method_config: dict[str, Any],
        prefill: str,
        sites: list[list[str]],
        left_dense: list[str],
        calibration: CalibrationEntry,
        linears: dict[str, LinearEntry],
        allocation: str = "uniform",
        neurons: NeuronCuts | None = None,
        rotated: bool = False,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.schema_version = SCHEMA_VERSION
        self.sparsify_version = sparsify_version
        self.method = method
        self.method_config = method_config
        self.prefill = prefill
        self.sites = sites
        self.left_dense = left_dense
        self.calibration = calibration
        self.linears = linears
        self.allocation = allocation
        self.neurons = neurons
        self.rotated = rotated

    @property
    def sparsity(self) -> float:
        """The nominal sparsity that was asked for."""
        return float(self.method_config["sparsity"])

    def to_dict(self) -> dict[str, Any]:
        data = copy.deepcopy(self.__dict__)
        data["calibration"] = asdict(self.calibration)
        data["linears"] = {
            name: {k: v for k, v in asdict(entry).items() if v is not None} for name, entry in self.linears.items()
        }
        if self.allocation == "uniform":
            # Readers that know no other allocation refuse the key.
            del data["allocation"]
        if self.neurons is None:
            # The same for readers that know no neurons.
            del data["neurons"]
        else:
            mlps = [{k: v for k, v in asdict(mlp).items() if v is not None} for mlp in self.neurons.mlps]
            data["neurons"] = {"cut": self.neurons.cut, "mlps": mlps}
        if not self.rotated:
            del data["rotated"]
        return data

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads what to_dict wrote. Raises CheckpointError for any key, type or value that is not of this schema."""
        where = "quantization_config"
        version = config_dict.get("schema_version") if isinstance(config_dict, Mapping) else None
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{where}: schema_version is {version!r}, this sparsify reads {SCHEMA_VERSION}: "
                "convert the model again, or install the sparsify that wrote it"
            )
        for key in ("linears", "sites", "left_dense"):
            names = config_dict.get(key)
            if isinstance(names, Mapping | list) and len(names) > _MOST_LINEARS:
                raise CheckpointError(f"{where}: {key} has {len(names):,} entries, {_MOST_LINEARS:,} at most are read")
        raw = from_mapping(_Schema, config_dict, where=where, error=CheckpointError)
        for key, value in (("method", raw.method), ("allocation", raw.allocation)):
            if not _NAME.fullmatch(value):
                raise CheckpointError(f"{where}: {key} is {value!r}, a name of letters, digits, . + and - is expected")
        if raw.prefill not in get_args(Prefill):
            raise CheckpointError(f"{where}: prefill is {raw.prefill!r}, allowed are {', '.join(get_args(Prefill))}")
        sparsity = raw.method_config.get("sparsity", math.nan)
        if type(sparsity) not in (int, float) or not 0.0 <= sparsity < 1.0:
            raise CheckpointError(
                f"{where}: method_config has the sparsity {sparsity!r}, it must be a number in [0, 1)"
            )
        config = cls(
            sparsify_version=raw.sparsify_version,
            method=raw.method,
            method_config=dict(raw.method_config),
            prefill=raw.prefill,
            sites=[list(map(str, names)) for names in raw.sites],
            left_dense=list(raw.left_dense),
            calibration=_calibration(raw.calibration, f"{where}.calibration"),
            linears={name: _linear_entry(name, entry, where) for name, entry in raw.linears.items()},
            allocation=raw.allocation,
            neurons=None if raw.neurons is None else _neurons(raw.neurons, f"{where}.neurons"),
            rotated=raw.rotated,
        )
        if sorted(name for names in config.sites for name in names) != sorted(config.linears):
            raise CheckpointError(f"{where}: sites and linears do not name the same linears")
        _check_rotations(config, where)
        return (config, kwargs) if return_unused_kwargs else config


def _calibration(data: object, where: str) -> CalibrationEntry:
    entry = from_mapping(CalibrationEntry, data, where=where, error=CheckpointError)
    for key, value in (("sequences", entry.sequences), ("seq_len", entry.seq_len)):
        if not 1 <= value < _LARGEST:
            raise CheckpointError(f"{where}: {key} is {value}, it must be at least 1")
    if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
        raise CheckpointError(f"{where}: sha256 is {entry.sha256!r}, 64 hexadecimal digits are expected")
    return entry


def _neurons(data: object, where: str) -> NeuronCuts:
    raw = from_mapping(_NeuronSchema, data, where=where, error=CheckpointError)
    if not raw.mlps:
        raise CheckpointError(f"{where}: it names no MLP")
    mlps = (from_mapping(Mlp, entry, where=f"{where}.mlps", error=CheckpointError) for entry in raw.mlps)
    return NeuronCuts(raw.cut, tuple(mlps))


def _check_rotations(config: SparsifyConfig, where: str) -> None:
    for names in config.sites:
        for name in names:
            owner = config.linears[name].rotation
            if owner is None:
                continue
            if owner not in names or config.linears[owner].rotation != owner:
                raise CheckpointError(
                    f"{where}.linears[{name!r}]: rotation is {owner!r}, which is not a linear of its site that has one"
                )
            if config.linears[name].cut != "top-k":
                raise CheckpointError(f"{where}.linears[{name!r}]: it has a rotation, but not the cut 'top-k'")


def _linear_entry(name: str, data: object, where: str) -> LinearEntry:
    entry = from_mapping(LinearEntry, data, where=f"{where}.linears[{name!r}]", error=CheckpointError)
    shares = {"sparsity": entry.sparsity, "rho": entry.rho, "density": entry.density}
    if entry.low_rank_error is not None:
        shares["low_rank_error"] = entry.low_rank_error
    for key, value in shares.items():
        if not 0.0 <= value <= 1.0:
            raise CheckpointError(f"{where}.linears[{name!r}]: {key} is {value}, it must be in [0, 1]")
    ranks = entry.energy_ranks
    if ranks is not None and not (len(ranks) == 3 and all(r is None or 0 <= r < _LARGEST for r in ranks)):
        raise CheckpointError(f"{where}.linears[{name!r}]: energy_ranks are {ranks}, three ranks are expected")
    if entry.rank < 0:
        raise CheckpointError(f"{where}.linears[{name!r}]: rank is {entry.rank}, it must be at least 0")
    if not (math.isfinite(entry.error) and entry.error >= 0.0):
        raise CheckpointError(f"{where}.linears[{name!r}]: error is {entry.error}, it must be finite and at least 0")
    return entry
