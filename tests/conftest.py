"""Settings and fixtures of every test: offline, few threads, uninitialised memory that cannot pass for a result."""

import copy
import gc
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch or transformers, and inherited by the processes that tests start.
_NO_GPU = not any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg"))
# One number for both: two MKL threads beside one of OpenMP made small decompositions a hundred times slower.
# A worker of xdist inherits what this file has set in the process that started it, and has one: two workers of two
# threads on two cores take several times as long.
_THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("OMP_NUM_THREADS") or "2"
os.environ |= {"OMP_NUM_THREADS": _THREADS, "MKL_NUM_THREADS": _THREADS}
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Without a GPU, Triton kernels run in its interpreter.
    **({"TRITON_INTERPRET": "1"} if _NO_GPU else {}),
}.items():
    os.environ.setdefault(_name, _value)

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sparsify.calibration import Calibration

_ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a GPU: the interpreter has no streams and no graphs"))


def pytest_collection_finish() -> None:
    """Keeps what was imported out of the garbage collector: a full collection takes 10 ms in the place of 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one, else the CPU, where Triton's kernels run in its interpreter."""
    pytest.importorskip("triton")
    from sparsify.kernels.gpu.site import INTERPRETED

    assert INTERPRETED or torch.cuda.is_available()
    return torch.device("cpu" if INTERPRETED else "cuda", None if INTERPRETED else torch.cuda.current_device())


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return _ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and texts outside the repository; a test that needs it is skipped where it is not."""
    folder = Path(os.environ.get("SPARSIFY_SHARED_DATA") or _ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no models and texts in {folder}; SPARSIFY_SHARED_DATA can name another folder")
    return folder


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that a value nobody wrote shows in the result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random bf16 Llama of two layers and a tokenizer of bytes; to be read only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "dense"
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(names), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sparse(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_dense converted with R-Sparse at 50%, with scales and ranks; to be read only."""
    import sparsify

    model = sparsify.load_dense(str(tiny_dense))
    torch.manual_seed(0)
    calibration = sparsify.Calibration(torch.randint(model.config.vocab_size, (4, 32)), "random tokens")
    sparsify.convert(model, sparsify.RSparse(sparsity=0.5, rho=0.8), calibration)
    out = tmp_path_factory.mktemp("models") / "sparse"
    return sparsify.save(model, out, sparsify.load_tokenizer(str(tiny_dense)), settings={"method": "rsparse"})


@pytest.fixture(scope="session")
def _tiny_llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Wide enough to matter: what is dropped must show in the logits.
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise) if parameter.dim() > 1 else parameter.add_(0.1 * noise)
    return model


@pytest.fixture
def tiny_llama(_tiny_llama: PreTrainedModel) -> PreTrainedModel:
    """A random dense Llama with grouped-query attention, 2 blocks of width 64, in fp32; each test has its own."""
    return copy.deepcopy(_tiny_llama)


@pytest.fixture(scope="session")
def tiny_calibration() -> Calibration:
    """Random tokens of tiny_llama's vocabulary, [4, 48]: as many windows as candidates are compared on."""
    return Calibration(torch.randint(3, 128, (4, 48), generator=torch.Generator().manual_seed(2)), "random tokens")


@pytest.fixture(scope="session")
def header_only() -> Callable[..., Path]:
    """Writes a model's folder whose weight files are headers and holes: header_only(folder, config, shards=1)."""
    return _write_header_only


def _write_header_only(folder: Path, config: PreTrainedConfig, *, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    config.dtype = "bfloat16"
    with no_init_weights(), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names, files = list(shapes), ["model.safetensors"]
    if shards > 1:
        files = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    parts = {file: names[index::shards] for index, file in enumerate(files)}
    if shards > 1:
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file, part in parts.items():
        _write_holes(folder / file, {name: shapes[name] for name in part})
    return folder


def _write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in shapes.items():
        end = place + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
