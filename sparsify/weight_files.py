"""Which tensor of a converted model goes to which file, decided by the dense model alone.

A model of up to SINGLE_FILE_BYTES is one file. A larger one is a file for each decoder block and a first one for all
that is outside of them: each can be written when its block is converted, and none has to be held or read for another.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sparsify.linear import SparseLayer
from sparsify.models import quiet
from sparsify.preflight import INDEX, SINGLE, merges
from sparsify.targets import decoder_blocks
from sparsify.tensor_file import tensor_entry, write_tensors

SINGLE_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Layout:
    """The files of a model: `units` of them, unit 0 outside of the blocks and unit i of block i − 1, or one for all."""

    prefix: str
    units: int
    single: bool

    def unit_of(self, name: str) -> int:
        """Returns the unit of a tensor by its name in the model."""
        found = re.match(rf"{re.escape(self.prefix)}\.(\d+)\.", name)
        return int(found[1]) + 1 if found else 0

    def file_of(self, unit: int) -> str:
        """Returns the name of the file that holds a unit."""
        return SINGLE if self.single else f"model-{unit + 1:05d}-of-{self.units:05d}.safetensors"


def layout_of(model: PreTrainedModel, names: Mapping[str, str]) -> Layout:
    """Returns the layout of a model, dense or converted, on any device; names are its stored_names."""
    prefix, blocks = decoder_blocks(model)
    added = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, SparseLayer)
        for key in module._buffers
    }
    state = model.state_dict()
    size = sum(state[name].nbytes for name in names if name not in added)
    return Layout(prefix, len(blocks) + 1, size <= SINGLE_FILE_BYTES)


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """Returns {name in the model: name in the file} of all that save_pretrained writes, without tied copies.

    For models whose tensors are only renamed on their way to the disk (`sparsify.preflight.merges`).
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state: dict[str, Tensor] = dict(model.state_dict())
    for ignored in model._keys_to_ignore_on_save or ():
        state.pop(ignored, None)
    state = remove_tied_weights_from_state_dict(state, model)
    written = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(state)).items()}
    return {name: written[id(tensor)] for name, tensor in state.items()}


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Writes configuration and weights of a converted model in memory, in the files of its layout."""
    if merges(model):
        # Streaming does not convert these, so transformers' own files have no equal to keep to.
        with quiet():
            model.save_pretrained(folder)
        return
    names = stored_names(model)
    layout = layout_of(model, names)
    if layout.single:
        with quiet():
            model.save_pretrained(folder)
        return
    save_description(model, folder)
    state: Any = model.state_dict()
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(layout.file_of(layout.unit_of(name)), []).append(name)
    for file, held in files.items():
        write_tensors(folder / file, {names[name]: tensor_entry(state[name]) for name in held})
    total = sum(state[name].nbytes for name in names)
    write_index(folder, {names[name]: file for file, held in files.items() for name in held}, total)


def save_description(model: PreTrainedModel, folder: Path) -> None:
    """Writes what save_pretrained writes besides weights: configurations and the code of a model that has its own."""
    # It would give the whole state in the place of none.
    quantizer = model.__dict__.pop("hf_quantizer", None)
    # Elsewhere first: save_pretrained removes files that it takes for shards of an earlier save.
    try:
        with quiet(), TemporaryDirectory(dir=folder) as apart:
            model.save_pretrained(apart, state_dict={})
            for path in Path(apart).iterdir():
                path.rename(folder / path.name)
    finally:
        if quantizer is not None:
            model.__dict__["hf_quantizer"] = quantizer


def write_index(folder: Path, files: Mapping[str, str], total: int) -> None:
    """Writes the index {tensor: file} of a model of `total` bytes, as transformers does."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(files)}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
