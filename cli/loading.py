"""Loads what a command's MODEL names, dense or converted, with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparsify.cli.placement import Placement
from sparsify.cli.progress import Progress
from sparsify.cli.settings import ConvertSettings
from sparsify.errors import SparsifyError, UnavailableError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Such as cpu or cuda:0.", show_default="a GPU if there is one")
]
BackendOption = Annotated[
    str | None, typer.Option("--backend", help="The kernels to use; see `sparsify doctor`.", show_default="the fastest")
]
PrefillOption = Annotated[
    Literal["sparse", "dense"] | None,
    typer.Option("--prefill", help="How the prompt runs.", show_default="as the checkpoint says"),
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]

# Files that a conversion writes: where one is, loading must check them all rather than take the folder as dense.
_OURS = ("sparsify_manifest.json", "sparsify_ledger.json", "sparsify.yaml")


@dataclass(frozen=True)
class Loaded:
    """A model on its device, its tokenizer, and whether it is a converted one."""

    spec: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    converted: bool


def load(
    spec: str,
    progress: Progress,
    *,
    dtype: str = "auto",
    device: str | None = None,
    backend: str | None = None,
    prefill: str | None = None,
    trust_remote_code: bool = False,
    placement: Placement | None = None,
) -> Loaded:
    """Loads a converted checkpoint sparse and any other model dense; placement: in the place of a device.

    Raises SparsifyError for what cannot be loaded, and for a backend or prefill that a dense model cannot have.
    """
    from sparsify import checkpoint, models

    placement = placement or Placement(device)
    placed = placement.options()
    place = None if placed else pick_device(placement.device)
    source = _local_checkpoint(spec)
    if source is None:
        for name, value in (("--backend", backend), ("--prefill", prefill)):
            if value is not None:
                raise SparsifyError(f"{name} {value} is for converted checkpoints; {spec} is a dense model")
    progress.note(f"loading {spec}")
    if source is None:
        tokenizer = models.load_tokenizer(spec, trust_remote_code=trust_remote_code)
        model = models.load_dense(spec, dtype=dtype, device=place, trust_remote_code=trust_remote_code, **placed)
    else:
        checkpoint.check_before_loading(source)
        with checkpoint.as_checkpoint_errors():
            tokenizer = models.load_tokenizer(source, trust_remote_code=trust_remote_code)
        model = checkpoint.load(
            source, dtype=dtype, device=place, prefill=prefill, backend=backend, trust_remote_code=trust_remote_code,
            **placed,
        )  # fmt: skip
    placement.check(model)
    return Loaded(spec, model, tokenizer, source is not None)


def is_converted(folder: str | Path) -> bool:
    """Tells whether a folder is, or once was, a converted checkpoint."""
    from sparsify.checkpoint import is_checkpoint

    return is_checkpoint(folder) or any((Path(folder) / name).is_file() for name in _OURS)


def _local_checkpoint(spec: str) -> str | None:
    """Returns the folder of a converted checkpoint, downloaded if it is on the hub; None for a dense model."""
    import huggingface_hub

    from sparsify import models

    source = models.resolve_model(spec)
    if Path(source).is_dir():
        return source if is_converted(source) else None
    with models.hub_errors(spec, source):
        config = huggingface_hub.hf_hub_download(source, "config.json")
        return huggingface_hub.snapshot_download(source) if is_converted(Path(config).parent) else None


def pick_device(name: str | None) -> str:
    """Returns the device to use: the named one, else the first GPU, else the CPU.

    Raises SparsifyError for what is no device, UnavailableError for one that is not here.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kinds = ("cpu", "cuda", "mps", "xpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SparsifyError(f"{name!r} is not a device: use cpu, cuda or cuda:N.{suggest(name, kinds)}") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).partition("\n")[0].rstrip(".")
        raise UnavailableError(f"device {name!r} cannot be used here: {reason}; see `sparsify doctor`") from None
    return name


def identify(model: "PreTrainedModel") -> str | None:
    """Returns the checkpoint_sha256 of the folder that a model was loaded from; None where it is no checkpoint."""
    from sparsify.manifest import checkpoint_sha256

    return checkpoint_sha256(Path(model.name_or_path)) if model.name_or_path else None


def made_from(spec: str) -> str:
    """Returns the MODEL that a converted checkpoint was made from, by its sparsify.yaml; else the spec itself.

    Raises CheckpointError for a sparsify.yaml that cannot be read.
    """
    settings = Path(spec) / "sparsify.yaml"
    if not settings.is_file():
        return spec
    from sparsify.checkpoint import as_checkpoint_errors

    with as_checkpoint_errors():
        return ConvertSettings.from_yaml(settings).model or spec
