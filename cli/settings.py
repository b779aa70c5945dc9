"""The settings of a conversion: every flag of `sparsify convert`, from flags over a YAML file over defaults.

The same document is written into the checkpoint (sparsify.yaml), so a conversion can be repeated from it.
What belongs to one call only (--config, --dry-run, --format, --save) is not a setting.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from sparsify.errors import SparsifyError
from sparsify.strict import from_mapping, read_settings


@dataclass(frozen=True)
class ConvertSettings:
    """What one conversion is made from; None stands for the method's own default, or for the best device."""

    model: str | None = None
    out: str | None = None
    method: str = "auto"
    sparsity: float | None = None
    max_ppl_increase: int | float | str | None = None
    speedup: float | None = None
    held_out: int | None = None
    cost_table: str | None = None
    allocation: str | None = None
    allocation_state: str | None = None
    rho: int | float | str | None = None
    score: str | None = None
    recipe: str | None = None
    svd: str | None = None
    compensate: bool = False
    cut: float | None = None
    cett: float | None = None
    activation: str | None = None
    after_norms: bool = False
    zeros: float | None = None
    reconstruct: int | None = None
    reconstruct_inputs: str | None = None
    reconstruct_weighting: str | None = None
    reconstruct_zeros: float | None = None
    reconstruct_state: str | None = None
    plain: bool = False
    rotation: str | None = None
    rotate: bool = False
    calibration: str = "stdlib:calibration"
    sequences: int = 32
    seq_len: int = 512
    prefill: Literal["sparse", "dense"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    seed: int = 0
    eval_windows: int = 8
    trust_remote_code: bool = False

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Reads a YAML file of settings; raises SparsifyError for anything that is not one."""
        return cls().updated(read_settings(path), source=str(path))

    def updated(self, values: Mapping[str, Any], *, source: str) -> Self:
        """Returns the settings with these values; an unknown name or a wrong type is refused, naming the source."""
        # A flag's spelling in a file is a slip that gets the right suggestion, not a second spelling that is read.
        spelled = {str(name).replace("-", "_"): str(name) for name in values}
        for field, name in spelled.items():
            if field != name and field in _names():
                raise SparsifyError(f"{source}: unknown key {name!r}. Did you mean {field!r}?")
        return from_mapping(type(self), asdict(self) | dict(values), where=source)


def parse_rho(text: str | None) -> float | str | None:
    """Returns the number in the flag's text; other text ("auto", a mistake) is left for the method to judge."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _names() -> list[str]:
    return [field.name for field in fields(ConvertSettings)]
