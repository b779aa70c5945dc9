"""Recipes of `sparsify compare`: everything that one comparison is made from, as YAML files that come with the package.

A recipe names the setting of a published number; flags of the command win over it. docs/results/published.md says what
was published and how its protocol differs from ours.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from sparsify.errors import SparsifyError, suggest
from sparsify.evals.compare import METHODS, SPARSITIES
from sparsify.evals.compare_subject import Settings
from sparsify.evals.generation_check import GenerationSettings
from sparsify.strict import from_mapping

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One comparison; the defaults are the command's. text None stands for the model's default evaluation text.

    generation: prompts of the generation check, 0 for none; about: one sentence on what the recipe is for.
    """

    model: str | None = None
    calibration: str = "stdlib:calibration"
    text: str | None = None
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    sparsities: list[float] = field(default_factory=lambda: list(SPARSITIES))
    protocols: list[str] = field(default_factory=lambda: ["every-token"])
    seeds: int = 1
    sequences: int = 32
    seq_len: int = 512
    stride: int | None = None
    limit: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    generation: int = 0
    new_tokens: int = 128
    about: str = ""

    def updated(self, values: Mapping[str, Any], *, source: str) -> Self:
        """Returns the recipe with these values; an unknown name or a wrong type is refused, naming the source."""
        return from_mapping(type(self), asdict(self) | dict(values), where=source)

    def settings(self, *, device: str | None = None, trust_remote_code: bool = False) -> Settings:
        """Returns what all cells share, as `run` takes it."""
        check = GenerationSettings(prompts=self.generation, new_tokens=self.new_tokens) if self.generation else None
        return Settings(
            seq_len=self.seq_len, stride=self.stride, limit=self.limit, sequences=self.sequences,
            batch_size=self.batch_size, dtype=self.dtype, device=device, trust_remote_code=trust_remote_code,
            generation=check,
        )  # fmt: skip


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Returns a recipe that comes with the package. Raises SparsifyError for a name that is none of them."""
    names = recipe_names()
    if name not in names:
        raise SparsifyError(f"unknown recipe {name!r}: there are {', '.join(names)}.{suggest(name, names)}")
    document = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return Recipe().updated(document, source=f"recipe {name}")
