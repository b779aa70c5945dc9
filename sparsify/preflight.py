"""Checks a checkpoint's files before any weight is read: where they lie, what they hold, whether it is finite.

Only headers and the small tensors that sparsify added are read. Not covered: bit flips in dense weights, which the
manifest's SHA-256 finds (`sparsify verify`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from sparsify.errors import CheckpointError
from sparsify.header import FLOATS, StoredTensor, read_header
from sparsify.linear import SparseConv1D, SparseLinear
from sparsify.runtime import sparse_layers
from sparsify.strict import JSON_BYTES, read_json
from sparsify.token_layer import is_rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADDED = ("threshold", "scale", "lr_a", "lr_b", "sparse_bias", "rotation")
INDEX = "model.safetensors.index.json"

SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_FILE_NAME = re.compile(r"\w[\w.-]{0,200}", re.ASCII)
# GPT-Neo's causal masks of 2,048 positions have 100 MB in 24 blocks.
_UNSTORED_BYTES = 256 << 20


def check_folder(folder: Path) -> None:
    """Refuses a folder with anything but regular files and folders in it, or with a link that leaves it.

    A pipe or a device would be read without an end. Links may leave the folder for the blobs of the hub's cache only.
    Raises CheckpointError, also for an adapter, which transformers would put on top of the model.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if _link_leaves(path, folder):
                raise CheckpointError(
                    f"{path} is a link to {os.readlink(path)}, which is outside of its folder: refused"
                )
            if not (path.is_file() or path.is_dir()):
                raise CheckpointError(f"{path} is neither a file nor a folder: refused")
    _refuse_adapter(folder)


def check_files(files: Sequence[str], model: PreTrainedModel) -> None:
    """Checks the safetensors files against a model skeleton that has its sparse layers.

    Raises CheckpointError for a file outside the checkpoint's folder, an unreadable header, a missing, doubled,
    misshapen or unexpected tensor, a wrong dtype, and for added tensors that are not finite or out of their range.
    """
    paths = [Path(file) for file in files]
    source = model.config.name_or_path
    check_places(paths, Path(source) if source and Path(source).is_dir() else None)
    _refuse_adapter(paths[0].parent)
    if paths[0].name != SINGLE and (paths[0].parent / INDEX).is_file():
        check_index(paths[0].parent)
    stored = read_headers(paths)
    _check_unstored(model, sum(path.stat().st_size for path in paths))
    owners = translated(stored, model)
    known = model.state_dict()
    for name, held in owners.items():
        dense = name in known and name.rpartition(".")[2] not in ADDED
        if dense and known[name].is_floating_point() and held.dtype not in FLOATS:
            raise CheckpointError(f"{name} is stored as {held.dtype}, one of {', '.join(FLOATS)} is expected")
    layers = sparse_layers(model)
    for name, layer in layers.items():
        _check_layer(name, layer, owners)
    expected = {f"{name}.{added}" for name in layers for added in ADDED}
    for tensor in owners:
        base, _, last = tensor.rpartition(".")
        if last in ADDED and (tensor not in expected or layers[base]._buffers.get(last) is None):
            raise CheckpointError(f"the checkpoint holds {tensor!r}, which its quantization_config does not name")
    # Tensors that transformers merges while it reads them cannot be compared: check_loaded sees what is missing then.
    if not merges(model):
        _refuse_missing(model, [name for name in known if name not in owners])
        _refuse_unknown(model, [name for name in owners if name not in known])
    for name, held in owners.items():
        if name in known:
            _check_shape(name, held.shape, known[name])


def check_dense(stored: Mapping[str, StoredTensor], model: PreTrainedModel) -> None:
    """Checks the tensors of a dense model's files, by their headers, against a skeleton of it.

    Raises CheckpointError for one that is missing or misshapen; what the model does not have is left to the loading.
    """
    known = model.state_dict()
    owners = {_full_name(name, known, model): held for name, held in translated(stored, model).items()}
    if not merges(model):
        _refuse_missing(model, [name for name in known if name not in owners])
    for name, held in owners.items():
        if name in known:
            _check_shape(name, held.shape, known[name])


def _full_name(name: str, known: Mapping[str, torch.Tensor], model: PreTrainedModel) -> str:
    # Some checkpoints, as GPT-2's, are of the model without its head, whose names lack the prefix.
    full = f"{model.base_model_prefix}.{name}"
    return full if name not in known and full in known else name


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
        if not inside or _link_leaves(path, path.parent):
            raise CheckpointError(f"the checkpoint's weights lie in {path}, which is outside of its folder: refused")
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path.name} is not a safetensors file: sparsify reads no other format")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or not a file: the checkpoint is incomplete")


def check_index(folder: Path) -> list[Path]:
    """Returns the weight files of a local folder, from its index or the single file.

    Raises CheckpointError where one is missing, an index entry is not a plain file name, or the index and the files'
    headers do not name the same tensors.
    """
    index, single = folder / INDEX, folder / SINGLE
    # The order in which transformers looks for them.
    if single.is_file():
        check_places([single], folder)
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}: it holds no weights to load")
    # Those of the largest mixtures of experts have some 10 MB.
    weight_map = _weight_map(index, read_json(index, error=CheckpointError, most=4 * JSON_BYTES))
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{index} points to {name!r}, which is not a file name inside its folder: refused")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing: the checkpoint is incomplete")
    paths = [folder / name for name in names]
    check_places(paths, folder)
    held = {name: tensor.path.name for name, tensor in read_headers(paths).items()}
    for name in [*weight_map, *held]:
        if weight_map.get(name) != held.get(name):
            there = weight_map.get(name) or "no file"
            raise CheckpointError(f"{index} says that {name!r} is in {there}, it is in {held.get(name) or 'none'}")
    return paths


def read_headers(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """Returns the tensors of all the files by name, from the headers alone.

    Raises CheckpointError where read_header does, and for a name that stands in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{name!r} stands in {path.name} and in {tensors[name].path.name}")
            tensors[name] = tensor
    return tensors


def weight_bytes(folder: Path, dtype: torch.dtype | str) -> int | None:
    """Returns the bytes of a local folder's weights in a dtype, "auto" for as they are stored; None for other folders.

    Raises CheckpointError as check_index does.
    """
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return None
    tensors = read_headers(check_index(folder)).values()
    if isinstance(dtype, str):
        return sum(tensor.end - tensor.begin for tensor in tensors)
    return sum(math.prod(tensor.shape) * dtype.itemsize for tensor in tensors)


def _weight_map(index: Path, content: object) -> dict[str, str]:
    if not isinstance(content, dict) or not isinstance(content.get("metadata"), dict):
        raise CheckpointError(f"{index} cannot be read: it is not a mapping with 'metadata' and 'weight_map'")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} cannot be read: its weight_map is not a mapping of tensors to file names")
    return weight_map


def _refuse_adapter(folder: Path) -> None:
    # transformers puts an adapter that it finds beside the weights on top of the model, where peft is installed.
    if (folder / _ADAPTER).exists():
        raise CheckpointError(f"{folder / _ADAPTER} would change the model when it is loaded: remove it")


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _link_leaves(path: Path, folder: Path) -> bool:
    if not path.is_symlink():
        return False
    target, root = Path(os.path.realpath(path)), folder.resolve()
    cached = root.parent.name == "snapshots" and target.is_relative_to(root.parents[1] / "blobs")
    return not (cached or target.is_relative_to(root))


def _refuse_missing(model: PreTrainedModel, names: Sequence[str]) -> None:
    ignored = [*(model._keys_to_ignore_on_load_missing or ()), *map(re.escape, model.all_tied_weights_keys)]
    missing = [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the checkpoint has no {missing[0]!r}{more}: it is incomplete, convert or download it again"
        )


def _refuse_unknown(model: PreTrainedModel, names: Sequence[str]) -> None:
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unknown = [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(f"the checkpoint holds {unknown[0]!r}{more}, which {type(model).__name__} does not have")


def _check_unstored(model: PreTrainedModel, stored: int) -> None:
    """Refuses masks and tables that are made from the config alone, such as one of 10^6 × 10^6 positions."""
    kept = model.state_dict().keys()
    made = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in kept)
    if made > _UNSTORED_BYTES + stored:
        raise CheckpointError(
            f"config.json asks for {made:,} bytes of masks and tables beside {stored:,} bytes of weights: refused"
        )


def _conversions(model: PreTrainedModel) -> list[Any]:
    # Here, not above: this module is imported while transformers itself is.
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def merges(model: PreTrainedModel) -> bool:
    """Whether transformers makes tensors of this model from several of a file, as it does for many experts."""
    from transformers.core_model_loading import WeightRenaming

    return any(not isinstance(conversion, WeightRenaming) for conversion in _conversions(model))


def translated(stored: Mapping[str, StoredTensor], model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Returns the tensors by module names: some families (Gemma 3 with vision) have other names on the disk."""
    from transformers.core_model_loading import WeightRenaming

    renamings = [conversion for conversion in _conversions(model) if isinstance(conversion, WeightRenaming)]
    found: dict[str, StoredTensor] = {}
    for tensor in stored.values():
        name = tensor.name
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        if name in found:
            raise CheckpointError(f"{tensor.name!r} and {found[name].name!r} are both {name!r}: refused")
        found[name] = tensor
    return found


def _check_layer(name: str, layer: SparseLinear | SparseConv1D, owners: Mapping[str, StoredTensor]) -> None:
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
        stored = owners[full]
        _check_shape(full, stored.shape, tensor)
        wanted = "F32" if key in ("threshold", "scale") else owners[f"{name}.weight"].dtype
        if key in ADDED and stored.dtype != wanted:
            raise CheckpointError(f"{full} is stored as {stored.dtype}, {wanted} is expected")
        if key in ADDED:
            values = _check_values(full, key, stored)
            if key == "threshold" and (problem := _threshold_problem(layer, float(values))) is not None:
                raise CheckpointError(f"{full} {problem}: the checkpoint is damaged, convert again")
            if key == "rotation" and not is_rotation(values):
                raise CheckpointError(f"{full} is not orthogonal: the checkpoint is damaged, convert again")


def _threshold_problem(layer: SparseLinear | SparseConv1D, value: float) -> str | None:
    if value == 0.0 and math.copysign(1.0, value) < 0.0:
        return "holds -0, which no conversion writes"
    return layer.threshold_problem(value)


def _check_shape(name: str, shape: Sequence[int], tensor: torch.Tensor) -> None:
    if list(tensor.shape) != list(shape):
        raise CheckpointError(f"{name} has the shape {list(shape)}, {list(tensor.shape)} is expected")


def _check_values(full: str, key: str, stored: StoredTensor) -> torch.Tensor:
    try:
        with safe_open(stored.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored.name)
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(
            f"{stored.path} is not a readable safetensors file ({problem}): download it again"
        ) from None
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{full} holds values that are not finite: the checkpoint is damaged, convert again")
    if key == "scale" and bool((tensor < 0).any()):
        raise CheckpointError(f"{full} holds negative scales: the checkpoint is damaged, convert again")
    return tensor
