"""Saves, loads and verifies converted checkpoints: a Hugging Face folder plus tensors, a ledger and a manifest."""

import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsify.card import render_card
from sparsify.config import QUANT_METHOD, SparsifyConfig
from sparsify.differences import json_differences
from sparsify.errors import CheckpointError, SparsifyError, one_line
from sparsify.ledger import Ledger, ledger_of
from sparsify.manifest import check_manifest, write_manifest
from sparsify.model_config import check_implementations, check_model_config
from sparsify.models import hub_errors, load_dense, parse_dtype, quiet, to_device
from sparsify.new_folder import new_folder
from sparsify.plugin import add_sparse_layers, register
from sparsify.preflight import check_files, check_folder, check_index, read_headers
from sparsify.runtime import is_divided, set_prefill, sparse_layers, switch_of
from sparsify.strict import JSON_BYTES, read_json
from sparsify.weight_files import save_weights

LEDGER = "sparsify_ledger.json"
SETTINGS = "sparsify.yaml"
_READ_BESIDE = ("generation_config.json", "tokenizer_config.json")


def save(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    source: str | None = None,
    settings: Mapping[str, Any] | None = None,
    measured: Mapping[str, Mapping[str, Any]] | None = None,
    budget: str | None = None,
    relufied: str | None = None,
) -> Path:
    """Writes the converted model to the new folder `out` and returns it.

    Everything is written and synced in a hidden folder beside `out`, which appears by one rename: a kill leaves no
    half checkpoint. source names the dense model in the card; settings go to sparsify.yaml; measured to the card, and
    so do budget, which says how the sparsity was found, and relufied, how the model got its ReLUs.
    Raises SparsifyError for a dense model, a part of one and an `out` that exists, UnavailableError for a full disk.
    """
    out = Path(out)
    if not sparse_layers(model):
        raise SparsifyError("this model is not converted: save it with its own save_pretrained")
    if is_divided(model):
        raise SparsifyError("this process holds a part of the model: write it with save_pretrained, in every process")
    with new_folder(out) as staging:
        _write(model, staging, tokenizer, source or source_name(model), settings or {}, measured, budget, relufied)
    return out


def load(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    dense: bool = False,
    prefill: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads a converted checkpoint, sparse or, with dense, as the dense model that it also is.

    prefill: "sparse" or "dense" instead of the checkpoint's; backend: a kernel backend by name; options go to
    from_pretrained. Raises CheckpointError for a folder that is not a sound checkpoint, before weights are read.
    """
    folder = Path(folder)
    check_before_loading(folder)
    # Said explicitly: without it transformers asks at the terminal.
    trust = bool(options.pop("trust_remote_code", False))
    wanted = parse_dtype(dtype)
    register()
    with as_checkpoint_errors():
        if dense:
            return load_dense(str(folder), dtype=dtype, device=device, trust_remote_code=trust)
        with hub_errors(str(folder), str(folder)), quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, trust_remote_code=trust, **options)
    model = to_device(model, device)
    for layer in sparse_layers(model).values() if backend is not None else ():
        layer.bind(backend)
    if prefill is not None:
        set_prefill(model, prefill)
    loaded: PreTrainedModel = model.eval()
    return loaded


def check_before_loading(folder: str | Path) -> None:
    """Checks what can be checked from names, config.json and the index, before anything else of the folder is read.

    Raises CheckpointError for a folder with links out of it, pipes, devices or an adapter; for a config.json that is no
    sound checkpoint's or asks for impossible sizes; for an index that is not of files inside the folder; and for
    headers that lie.
    """
    folder = Path(folder)
    read_config(folder)
    check_folder(folder)
    read_headers(check_index(folder))
    for name in _READ_BESIDE:
        if (folder / name).exists() and not isinstance(
            read_json(folder / name, error=CheckpointError, most=JSON_BYTES), dict
        ):
            raise CheckpointError(f"{folder / name} cannot be read: it is not a mapping")


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder's config.json says that sparsify wrote it."""
    try:
        config = read_json(Path(folder) / "config.json", most=JSON_BYTES)
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (SparsifyError, LookupError, TypeError):
        return False


def read_config(folder: str | Path) -> SparsifyConfig:
    """Returns the folder's SparsifyConfig. Raises CheckpointError where it has none or not a sound one."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    config = read_json(path, error=CheckpointError, most=JSON_BYTES)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(config).__name__}, not a mapping")
    check_model_config(config)
    check_implementations(config)
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{folder} is not a sparsify checkpoint: convert it first with `sparsify convert`")
    parsed: SparsifyConfig = SparsifyConfig.from_dict(section)
    return parsed


def read_ledger(folder: str | Path) -> Ledger:
    """Returns the folder's ledger. Raises CheckpointError where it is missing or not one."""
    path = Path(folder) / LEDGER
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {LEDGER}: it was not written by `sparsify convert`")
    return Ledger.from_dict(read_json(path, error=CheckpointError, most=JSON_BYTES))


def verify(folder: str | Path) -> list[str]:
    """Returns one line for everything wrong with a checkpoint: files against the manifest, tensors against the config,
    the ledger against both.

    Raises CheckpointError where the folder is not a checkpoint at all.
    """
    folder = Path(folder)
    if not is_checkpoint(folder):
        read_config(folder)
    check_folder(folder)
    problems = check_manifest(folder)
    try:
        model = _skeleton(folder, read_config(folder))
        check_files([str(file) for file in check_index(folder)], model)
        read_ledger(folder)
        ledger = read_json(folder / LEDGER, error=CheckpointError, most=JSON_BYTES)
        problems += json_differences(LEDGER, ledger, ledger_of(model).to_dict())
    except SparsifyError as problem:
        problems.append(one_line(str(problem)))
    return problems


@contextmanager
def as_checkpoint_errors() -> Iterator[None]:
    """Raises bad input as CheckpointError: what cannot be read of a checkpoint is its fault, not the caller's."""
    try:
        yield
    except SparsifyError as problem:
        if type(problem) is SparsifyError:
            raise CheckpointError(str(problem)) from problem
        raise
    except AssertionError as problem:
        # torch's own words for some sizes, such as a padding token that is none; one of ours is a bug.
        *_, (frame, _) = traceback.walk_tb(problem.__traceback__)
        if frame.f_globals["__name__"].startswith("sparsify"):
            raise
        raise CheckpointError(f"the checkpoint could not be loaded: {problem}") from problem


def _skeleton(folder: Path, config: SparsifyConfig) -> PreTrainedModel:
    """Returns the model without memory, on the meta device, with its sparse layers."""
    with as_checkpoint_errors(), hub_errors(str(folder), str(folder)):
        dense = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        del dense.quantization_config
        with torch.device("meta"):
            found: Any = AutoModelForCausalLM.from_config(dense, trust_remote_code=False)  # type: ignore[no-untyped-call]
    add_sparse_layers(found, config)
    found.config.quantization_config = config
    model: PreTrainedModel = found
    return model


def source_name(model: PreTrainedModel) -> str:
    """Returns what the card calls the dense model: a hub id, or a local folder's name and not its path."""
    name = str(model.config.name_or_path)
    return Path(name).resolve().name if Path(name).is_dir() else name


def _write(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
    settings: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Any]] | None,
    budget: str | None,
    relufied: str | None,
) -> None:
    config = model.config.quantization_config
    assert isinstance(config, SparsifyConfig)
    # The checkpoint runs prompts as the model does now.
    config.prefill = switch_of(model).prefill
    save_weights(model, folder)
    write_beside(model, folder, tokenizer, source, settings, measured, budget, relufied)
    write_manifest(folder)


def write_beside(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
    settings: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, Any]] | None,
    budget: str | None = None,
    relufied: str | None = None,
) -> None:
    """Writes what a checkpoint has besides weights, config.json and manifest; the model may be on the meta device."""
    config = model.config.quantization_config
    assert isinstance(config, SparsifyConfig)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    ledger = ledger_of(model)
    card = render_card(config, ledger, source=source, measured=measured, budget=budget, relufied=relufied)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / LEDGER).write_text(json.dumps(ledger.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / SETTINGS).write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
