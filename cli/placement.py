"""Where a model larger than one device lies: --device-map, --max-memory and --offload-folder, by accelerate."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsify.errors import SparsifyError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="HOW",
        help="Spread a model that one device cannot hold over all of them, memory and disk: auto, balanced, "
        "balanced_low_0 or sequential.",
        show_default="one device",
    ),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="LIST",
        help="Of each place at most, such as 0=20GiB,1=20GiB,cpu=60GiB; needs --device-map.",
    ),
]
OffloadFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--offload-folder",
        metavar="DIR",
        help="For parts on disk that cannot be read from the checkpoint itself.",
        show_default="a temporary folder",
    ),
]

_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Placement:
    """The flags of one command: a device, or a map of several with their limits.

    Raises SparsifyError for flags that do not go together or cannot be read.
    """

    device: str | None = None
    device_map: str | None = None
    max_memory: str | None = None
    offload_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.device_map is None:
            for name, value in (("--max-memory", self.max_memory), ("--offload-folder", self.offload_folder)):
                if value is not None:
                    raise SparsifyError(f"{name} is for --device-map: give it, such as --device-map auto")
            return
        if self.device is not None:
            raise SparsifyError(f"--device {self.device} and --device-map {self.device_map} are two places: give one")
        if self.device_map not in _MAPS:
            raise SparsifyError(
                f"unknown --device-map {self.device_map!r}: allowed are {', '.join(_MAPS)}."
                f"{suggest(self.device_map, _MAPS)}"
            )
        self._limits()

    def options(self) -> dict[str, Any]:
        """Returns the options of from_pretrained; none for one device."""
        if self.device_map is None:
            return {}
        folder = self.offload_folder
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="sparsify-offload-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return {"device_map": self.device_map, "max_memory": self._limits(), "offload_folder": folder}

    def check(self, model: "PreTrainedModel") -> None:
        """Raises SparsifyError where not even the embeddings found a place in memory: nothing can run then."""
        if self.device_map is not None and model.device.type == "meta":
            raise SparsifyError(
                f"--max-memory {self.max_memory} leaves the embeddings no place in memory: allow the first more"
            )

    def _limits(self) -> dict[int | str, str] | None:
        if self.max_memory is None:
            return None
        from accelerate.utils import convert_file_size_to_int

        limits: dict[int | str, str] = {}
        for part in self.max_memory.split(","):
            place, _, size = (text.strip() for text in part.partition("="))
            try:
                if not (place.isdecimal() or place == "cpu"):
                    raise ValueError(place)
                convert_file_size_to_int(size)
            except ValueError:
                raise SparsifyError(
                    f"--max-memory {self.max_memory}: {part!r} cannot be read; write 0=20GiB,cpu=60GiB, with the "
                    "number of a GPU or cpu, and MB, GB, MiB or GiB"
                ) from None
            limits[int(place) if place.isdecimal() else place] = size
        return limits
