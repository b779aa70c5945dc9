"""Checks a checkpoint's files before any weight is read: where they lie, what they hold, whether it is finite.

Only headers and the small tensors that sparsify added are read. Not covered: bit flips in dense weights, which the
manifest's SHA-256 finds (`sparsify verify`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from sparsify.errors import CheckpointError
from sparsify.linear import SparseConv1D, SparseLinear
from sparsify.runtime import sparse_layers
from sparsify.strict import read_json
from sparsify.token_layer import is_rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADDED = ("threshold", "scale", "lr_a", "lr_b", "sparse_bias", "rotation")
INDEX = "model.safetensors.index.json"

# File, name in the file, shape and dtype of a tensor.
_Owner = tuple[Path, str, list[int], str]


def check_files(files: Sequence[str], model: PreTrainedModel) -> None:
    """Checks the safetensors files against a model skeleton that has its sparse layers.

    Raises CheckpointError for a file outside the checkpoint's folder, an unreadable header, a missing, doubled,
    misshapen or unexpected tensor, a wrong dtype, and for added tensors that are not finite.
    """
    paths = [Path(file) for file in files]
    source = model.config.name_or_path
    check_places(paths, Path(source) if source and Path(source).is_dir() else None)
    owners = _translated(_owners(paths), model)
    layers = sparse_layers(model)
    for name, layer in layers.items():
        _check_layer(name, layer, owners)
    expected = {f"{name}.{added}" for name in layers for added in ADDED}
    for tensor in owners:
        base, _, last = tensor.rpartition(".")
        if last in ADDED and (tensor not in expected or layers[base]._buffers.get(last) is None):
            raise CheckpointError(f"the checkpoint holds {tensor!r}, which its quantization_config does not name")
    known = model.state_dict()
    # Tensors that transformers merges while it reads them cannot be compared: check_loaded sees what is missing then.
    if owners.keys() <= known.keys():
        _refuse_missing(model, [name for name in known if name not in owners])
        for name, (_, _, shape, _) in owners.items():
            _check_shape(name, shape, known[name])


def check_loaded(model: PreTrainedModel) -> None:
    """Raises CheckpointError for a tensor that from_pretrained did not find and initialised at random."""
    tensors = model.state_dict(keep_vars=True)
    # transformers marks what it read or tied; on the meta device is what is offloaded to disk.
    _refuse_missing(
        model, [n for n, t in tensors.items() if not t.is_meta and not getattr(t, "_is_hf_initialized", False)]
    )


def check_places(paths: Sequence[Path], folder: Path | None) -> None:
    """Refuses files outside the checkpoint's local folder, or not side by side: an index can point anywhere.

    Links may leave the folder for the blobs of the hub's cache only.
    """
    for path in paths:
        inside = path.parent == paths[0].parent if folder is None else _inside(path, folder)
        if not inside or _link_leaves(path):
            raise CheckpointError(f"the checkpoint's weights lie in {path}, which is outside of its folder: refused")
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path.name} is not a safetensors file: sparsify reads no other format")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or not a file: the checkpoint is incomplete")


def check_index(folder: Path) -> list[Path]:
    """Returns the weight files of a local folder, from its index or the single file.

    Raises CheckpointError where one is missing or an index entry is not a plain file name.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    # The order in which transformers looks for them.
    if single.is_file():
        check_places([single], folder)
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither model.safetensors nor {INDEX}: it holds no weights to load")
    content = read_json(index, error=CheckpointError)
    try:
        names = sorted({str(name) for name in content["weight_map"].values()})
    except (LookupError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{index} cannot be read ({type(problem).__name__}: {problem})") from None
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index} points to {name!r}, which is not a file name inside its folder: refused")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing: the checkpoint is incomplete")
    paths = [folder / name for name in names]
    check_places(paths, folder)
    return paths


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _link_leaves(path: Path) -> bool:
    if not path.is_symlink():
        return False
    target, folder = path.resolve(), path.parent.resolve()
    cached = folder.parent.name == "snapshots" and target.is_relative_to(folder.parents[1] / "blobs")
    return not (cached or target.is_relative_to(folder))


def _refuse_missing(model: PreTrainedModel, names: Sequence[str]) -> None:
    ignored = [*(model._keys_to_ignore_on_load_missing or ()), *map(re.escape, model.all_tied_weights_keys)]
    missing = [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint has no {missing[0]!r}{more}: it is incomplete, convert or download it again"
        )


def _owners(paths: Sequence[Path]) -> dict[str, _Owner]:
    """Returns {tensor name: (path, tensor name, shape, dtype)} from the headers alone."""
    owners: dict[str, _Owner] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in owners:
                        raise CheckpointError(f"{name!r} stands in {path.name} and in {owners[name][0].name}")
                    part = file.get_slice(name)
                    owners[name] = (path, name, part.get_shape(), part.get_dtype())
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(
                f"{path} is not a readable safetensors file ({problem}): it may be truncated, download or convert again"
            ) from None
    return owners


def _translated(owners: Mapping[str, _Owner], model: PreTrainedModel) -> dict[str, _Owner]:
    """Returns the owners by module names: some families (Gemma 3 with vision) have other names on the disk."""
    # Here, not above: this module is imported while transformers itself is.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    translated = {}
    for stored, owner in owners.items():
        name = stored
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        translated[name] = owner
    return translated


def _check_layer(name: str, layer: SparseLinear | SparseConv1D, owners: Mapping[str, _Owner]) -> None:
    expected: dict[str, torch.Tensor] = {"weight": layer.weight}
    if layer.bias is not None:
        expected["bias"] = layer.bias
    expected |= {key: buffer for key, buffer in layer._buffers.items() if buffer is not None}
    for key, tensor in expected.items():
        full = f"{name}.{key}"
        if full not in owners:
            reason = (
                "it was probably saved again without sparsify, which drops them: convert it again, or delete "
                "quantization_config from config.json to load the dense model"
                if key in ADDED
                else "it is incomplete"
            )
            raise CheckpointError(f"the checkpoint has no {full!r}: {reason}")
        path, stored, shape, dtype = owners[full]
        _check_shape(full, shape, tensor)
        if key in ("threshold", "scale") and dtype != "F32":
            raise CheckpointError(f"{full} is stored as {dtype}, F32 is expected")
        if key in ADDED:
            values = _check_values(stored, key, path)
            if key == "threshold" and (problem := layer.threshold_problem(float(values))) is not None:
                raise CheckpointError(f"{full} {problem}: the checkpoint is damaged, convert again")
            if key == "rotation" and not is_rotation(values):
                raise CheckpointError(f"{full} is not orthogonal: the checkpoint is damaged, convert again")


def _check_shape(name: str, shape: Sequence[int], tensor: torch.Tensor) -> None:
    if list(tensor.shape) != list(shape):
        raise CheckpointError(f"{name} has the shape {list(shape)}, {list(tensor.shape)} is expected")


def _check_values(full: str, key: str, path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(full)
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{full} holds values that are not finite: the checkpoint is damaged, convert again")
    if key == "scale" and bool((tensor < 0).any()):
        raise CheckpointError(f"{full} holds negative scales: the checkpoint is damaged, convert again")
    return tensor
