"""From what a user calls a model to a loaded one: a folder, a hub id, an alias, or `reference`."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparsify import activations
from sparsify.errors import CheckpointError, SparsifyError, UnavailableError, suggest
from sparsify.hub import hub_problem, is_cached
from sparsify.preflight import INDEX, check_index
from sparsify.rectified import rectify_named

REFERENCE = "reference"

ALIASES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "opt-6.7b": "facebook/opt-6.7b",
    "gpt2": "openai-community/gpt2",
    "tinyllama-1.1b": "TinyLlama/TinyLlama_v1.1",
    "olmo-2-7b": "allenai/OLMo-2-1124-7B",
}

# The error of whichever httpx the hub's library has; what the hub itself answered is derived from it.
_HTTPError: type[BaseException] = HfHubHTTPError.__bases__[0]
# What transformers raises for a config.json and weights that do not fit each other.
_LOAD_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError,
    _HTTPError, HFValidationError, StrictDataclassError, SafetensorError,
)  # fmt: skip

_NOT_CACHED = (
    "is not in the local cache: check the network and HF_HUB_OFFLINE, or download it elsewhere with `hf download` "
    "and give the folder"
)

_DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def resolve_model(spec: str) -> str:
    """Returns the local folder or hub id that `spec` names.

    `reference` is the bundled model; an alias is exact; anything with a path separator that exists is a folder; an
    `owner/name` is a hub id. Raises SparsifyError for a folder without a model and for a name that is none of these.
    """
    if spec == REFERENCE:
        return str(Path(__file__).parent / "reference")
    if spec in ALIASES:
        return ALIASES[spec]
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        if not (path / "config.json").is_file():
            raise SparsifyError(f"{spec} is a folder without a config.json: it is not a Hugging Face model")
        return str(path)
    if spec and path.exists():
        raise SparsifyError(f"{spec} is a file: give the folder that holds config.json and the weights")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec):
        return spec
    names = [REFERENCE, *ALIASES]
    raise SparsifyError(
        f"unknown model {spec!r}: give a folder, a hub id (owner/name), or one of {', '.join(names)}."
        f"{suggest(spec, names)}"
    )


def parse_dtype(name: str) -> "torch.dtype | str":
    """Returns the torch dtype of a name, "auto" for the checkpoint's own. Raises SparsifyError for another name."""
    if name not in _DTYPES:
        raise SparsifyError(f"unknown dtype {name!r}: allowed are {', '.join(_DTYPES)}.{suggest(name, _DTYPES)}")
    return _DTYPES[name]


def load_dense(
    spec: str, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False, **placed: Any
) -> PreTrainedModel:
    """Loads the model as a dense one in evaluation mode, a converted checkpoint too.

    placed: from_pretrained's device_map, max_memory and offload_folder, in the place of a device.
    Raises SparsifyError for an unknown model, UnavailableError where the hub does not give it.
    """
    source = resolve_model(spec)
    wanted = parse_dtype(dtype)
    activations.register()
    with hub_errors(spec, source), quiet():
        options = {"trust_remote_code": trust_remote_code, "local_files_only": _only_cached(source)}
        config = dense_config(spec, trust_remote_code=trust_remote_code)
        if any((Path(source) / name).exists() for name in ("model.safetensors", INDEX)):
            check_index(Path(source))
        found: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=wanted, output_loading_info=True, **options, **placed
        )
    model, info = found
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{spec} has no weight {missing[0]!r} ({len(missing)} are missing): it is incomplete, or it is not a "
            f"{type(model).__name__}; download it again"
        )
    rectify_named(model, model.config)
    loaded: PreTrainedModel = to_device(model, device).eval()
    return loaded


def load_skeleton(spec: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns load_dense's model without its memory, with all that a checkpoint says besides weights.

    Unlike sparsify.skeleton's, it knows how its tensors are named on the disk and how it generates. Raises as
    load_dense does, for a model whose weights are not here too.
    """
    return load_dense(spec, dtype=dtype, trust_remote_code=trust_remote_code, device_map={"": "meta"})


def local_folder(spec: str) -> Path:
    """Returns the folder that holds the files of a model that was loaded from `spec` just now."""
    source = resolve_model(spec)
    if Path(source).is_dir():
        return Path(source)
    config = try_to_load_from_cache(source, "config.json")
    if not isinstance(config, str):
        raise UnavailableError(f"{source} {_NOT_CACHED}")
    return Path(config).parent


def dense_config(spec: str, *, trust_remote_code: bool = False) -> Any:
    """Returns the config of a model as a dense one. Raises SparsifyError for one that another tool quantised."""
    source = resolve_model(spec)
    with hub_errors(spec, source):
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=_only_cached(source)
        )
    if getattr(config, "quantization_config", None) is not None:
        if config.quantization_config.get("quant_method") != "sparsify":
            raise SparsifyError(f"{spec} is quantised: sparsify works on models with floating-point weights")
        # Added tensors are then unexpected ones, which transformers leaves out.
        del config.quantization_config
    return config


def check_context(model: PreTrainedModel, tokens: int) -> None:
    """Raises SparsifyError where a sequence of that many tokens is longer than the model's positions."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(positions, int) and tokens > positions:
        raise SparsifyError(f"{tokens} tokens are more than this model's {positions} positions: use a shorter sequence")


def load_tokenizer(spec: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer. Raises as load_dense does."""
    source = resolve_model(spec)
    with hub_errors(spec, source):
        options = {"trust_remote_code": trust_remote_code, "local_files_only": _only_cached(source)}
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
        except Exception as problem:
            # The tokenizers library has no class of its own for what it cannot read.
            if type(problem) is not Exception:
                raise
            raise SparsifyError(f"the tokenizer of {spec} cannot be read: {_first_line(problem)}") from problem
    if not isinstance(tokenizer.model_max_length, int | float):
        raise SparsifyError(f"the tokenizer of {spec} has the longest input {tokenizer.model_max_length!r}")
    return tokenizer


def _only_cached(source: str) -> bool:
    """Whether to look no further than the local cache. Raises UnavailableError where that holds nothing either."""
    if Path(source).is_dir():
        return False
    problem = hub_problem()
    if problem and not is_cached(source):
        raise UnavailableError(f"the hub was not reached ({problem}) and {source} {_NOT_CACHED}")
    return problem is not None


@contextmanager
def hub_errors(spec: str, source: str) -> Iterator[None]:
    """Turns what a load raises into one error that names the model and the next step."""
    try:
        yield
    except SparsifyError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as problem:
        raise UnavailableError(
            f"not enough memory to load {spec}: {_first_line(problem)}; try --dtype bfloat16, another --device, or a "
            "machine with more"
        ) from problem
    except _LOAD_ERRORS as problem:
        raise _explain(spec, source, problem) from problem


def _explain(spec: str, source: str, problem: BaseException) -> SparsifyError:
    causes = _causes(problem)
    if Path(source).is_dir():
        return SparsifyError(f"{spec} could not be loaded as a causal language model: {_first_line(problem)}")
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return UnavailableError(
            f"{source} is gated: accept its licence on its hub page, then log in with `hf auth login` (or set HF_TOKEN)"
        )
    if any(_no_answer(cause) for cause in causes):
        return UnavailableError(f"the hub was not reached and {source} {_NOT_CACHED}")
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return SparsifyError(
            f"{source} is not on the hub, or not visible without a login: check the name; "
            "log in with `hf auth login` if it is private"
        )
    if any(isinstance(cause, HfHubHTTPError) and not isinstance(cause, EntryNotFoundError) for cause in causes):
        return UnavailableError(f"the hub did not give {source}: {_first_line(problem)}; try again later")
    return SparsifyError(f"{spec} could not be loaded as a causal language model: {_first_line(problem)}")


def _no_answer(cause: BaseException) -> bool:
    transport = isinstance(cause, _HTTPError) and not isinstance(cause, HfHubHTTPError)
    known = isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError | TimeoutError)
    return transport or known or "offline mode" in str(cause).lower()


def _causes(problem: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = problem
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def to_device(model: Any, device: str | None) -> Any:
    """Returns the model on the device, None for where it is. Raises UnavailableError for one that is not here."""
    if device is None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as problem:
        raise UnavailableError(f"device {device!r} cannot be used here: {_first_line(problem)}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers reports errors only and shows no bars: what we add to a checkpoint is unexpected to it."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if level == WARNING and "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
