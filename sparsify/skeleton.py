"""A dense model as its config and the headers of its weights say that it is: on the meta device, no weight is read.

For a hub model whose weights are not in the cache, its headers are asked of the hub, a few kilobytes of each file. The
weights themselves may lie in files whose headers are not read (.bin), or not be reachable: then the config alone says
what there is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from sparsify.errors import CheckpointError
from sparsify.header import FLOATS, StoredTensor
from sparsify.hub import hub_problem
from sparsify.models import dense_config, hub_errors, parse_dtype, quiet, resolve_model
from sparsify.preflight import INDEX, SINGLE, check_dense, check_index, read_headers
from sparsify.rectified import rectify_named

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class Skeleton:
    """The model on the meta device with the dtype that load_dense would give it, in evaluation mode.

    stored: its tensors by their names in the files, None where no header could be read; folder: where its files are
    here, None where they are not; read_from: what was read, in words.
    """

    model: PreTrainedModel
    stored: Mapping[str, StoredTensor] | None
    folder: Path | None
    read_from: str

    @property
    def stored_bytes(self) -> int | None:
        """The bytes of all tensors in the files."""
        return None if self.stored is None else sum(tensor.end - tensor.begin for tensor in self.stored.values())


def read_skeleton(spec: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> Skeleton:
    """Returns what `spec` names without its weights.

    Raises as load_dense does, for headers that lie and tensors that are missing or misshapen too; UnavailableError
    where neither the cache nor the hub has the config.
    """
    source = resolve_model(spec)
    wanted = parse_dtype(dtype)
    with hub_errors(spec, source), quiet():
        config = dense_config(spec, trust_remote_code=trust_remote_code)
        folder = _local_files(source)
        stored, read_from = _headers(source, folder)
        if not isinstance(wanted, torch.dtype):
            wanted = _own_dtype(config, stored)
        with no_init_weights(), torch.device("meta"):
            found: Any = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)  # type: ignore[no-untyped-call]
    model: PreTrainedModel = found.eval()
    rectify_named(model, model.config)
    model.tie_weights()
    if stored is not None:
        check_dense(stored, model)
    return Skeleton(model, stored, folder, read_from)


def stored_dense_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes that save_pretrained writes of a model's tensors, tied ones once; the model may be on meta."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = model.state_dict(keep_vars=True)
    return sum({id(tensor): tensor.nbytes for name, tensor in state.items() if name not in ignored}.values())


def _local_files(source: str) -> Path | None:
    if Path(source).is_dir():
        return Path(source)
    config = try_to_load_from_cache(source, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _headers(source: str, folder: Path | None) -> tuple[dict[str, StoredTensor] | None, str]:
    is_local = Path(source).is_dir()
    if folder is not None and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        try:
            return read_headers(check_index(folder)), "config and the headers of its weights"
        except CheckpointError:
            # A snapshot of the cache may lack some of the files that its index names; the hub has them.
            if is_local:
                raise
    if is_local:
        return None, "config alone: its weights are not safetensors files, so their headers are not read"
    if (problem := hub_problem()) is not None or huggingface_hub.constants.HF_HUB_OFFLINE:
        return None, f"config alone: its weights are not in the cache ({problem or 'HF_HUB_OFFLINE is set'})"
    try:
        metadata = huggingface_hub.get_safetensors_metadata(source)
    except NotASafetensorsRepoError:
        return None, "config alone: its weights on the hub are not safetensors files"
    tensors = {
        name: StoredTensor(Path(file), name, info.dtype, tuple(info.shape), *info.data_offsets)
        for file, held in metadata.files_metadata.items()
        for name, info in held.tensors.items()
    }
    return tensors, "config and the headers of its weights on the hub"


def _own_dtype(config: Any, stored: Mapping[str, StoredTensor] | None) -> torch.dtype:
    """Returns the dtype that from_pretrained takes for "auto": the config's, else the first tensor's, else fp32."""
    said = getattr(config, "dtype", None)
    if said is not None:
        found = getattr(torch, said) if isinstance(said, str) else said
        assert isinstance(found, torch.dtype)
        return found
    first = next((tensor.dtype for tensor in (stored or {}).values() if tensor.dtype in FLOATS), "F32")
    return _TORCH[first]
