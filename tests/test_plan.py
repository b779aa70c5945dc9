"""A plan reads no weight, and says what a conversion then writes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import sparsify
from sparsify import Calibration, SparsifyError
from sparsify.errors import CheckpointError, UnavailableError
from sparsify.low_rank import is_exact
from sparsify.methods.relu import Relu
from sparsify.plan import plan_conversion
from sparsify.preflight import ADDED
from sparsify.skeleton import read_skeleton, stored_dense_bytes

LLAMA_2_7B: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA_3_70B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
Write = Callable[..., Path]

METHODS = {
    "teal": sparsify.Teal(sparsity=0.5),
    "teal compensated": sparsify.Teal(sparsity=0.5, compensate=True),
    "wina": sparsify.Wina(sparsity=0.5),
    "rsparse": sparsify.RSparse(sparsity=0.5, rho=0.8),
    "rsparse dense": sparsify.RSparse(sparsity=0.0),
    "larosa": sparsify.Larosa(sparsity=0.4, rotation="layer"),
    "larosa, whole": sparsify.Larosa(sparsity=0.5),
    "cats": sparsify.Cats(sparsity=0.2),
    "griffin": sparsify.Griffin(sparsity=0.3),
}


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype)
    return empty.eval()


def written(folder: Path) -> dict[str, int]:
    """The bytes of a checkpoint's tensors: what was added by kind, and "dense" for all others."""
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                last = name.rpartition(".")[2]
                kind = last if last in ADDED else "dense"
                sizes[kind] = sizes.get(kind, 0) + file.get_tensor(name).nbytes
    return sizes


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_what_the_conversion_writes(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, name: str
) -> None:
    plan = plan_conversion(on_meta(tiny_llama), METHODS[name])
    folder = sparsify.save(sparsify.convert(tiny_llama, METHODS[name], tiny_calibration), tmp_path / "out")
    found = written(folder)
    assert plan.dense_bytes == found.pop("dense")
    assert {kind: (size.least, size.most) for kind, size in plan.added.items()} == {
        kind: (size, size) for kind, size in found.items()
    }
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(plan.shapes) == set(config["linears"])
    assert plan.rotated == config.get("rotated", False)
    assert plan.allocation == config.get("allocation", "uniform")


BOUNDED = {
    "rsparse, rho chosen": (sparsify.RSparse(sparsity=0.5), None),
    "rsparse, shares move": (sparsify.RSparse(sparsity=0.5, rho=0.8), "greedy"),
    "auto": (sparsify.Auto(sparsity=0.5), None),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_text_chooses_lies_between_the_bounds(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, name: str
) -> None:
    method, allocation = BOUNDED[name]
    plan = plan_conversion(on_meta(tiny_llama), method, allocation=allocation)
    model = sparsify.convert(tiny_llama, method, tiny_calibration, allocation=allocation)
    found = written(sparsify.save(model, tmp_path / "out"))
    assert plan.dense_bytes == found.pop("dense")
    for kind, size in found.items():
        assert size <= plan.added[kind].most
    assert plan.added_bytes.least <= sum(found.values()) <= plan.added_bytes.most
    # The bound says something: it is not the whole budget.
    assert plan.added_bytes.most < 0.5 * sum(shape.dense_bytes for shape in plan.shapes.values())


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("LlamaConfig", {"num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "experts": (
        "MixtralConfig",
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
    ),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotate", [False, True])
def test_families(family: str, rotate: bool, tmp_path: Path, tiny_calibration: Calibration) -> None:
    kind, options = FAMILIES[family]
    base = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "gpt2":
        base = {"vocab_size": 128}
    config = getattr(transformers, kind)(**base | options | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    model = AutoModelForCausalLM.from_config(config).eval()
    if rotate and family == "experts":
        with pytest.raises(SparsifyError, match="cannot be rotated"):
            plan_conversion(on_meta(model), METHODS["teal"], rotate=True)
        return
    plan = plan_conversion(on_meta(model), METHODS["teal"], rotate=rotate)
    sparsify.convert(model, METHODS["teal"], tiny_calibration, rotate=rotate)
    found = written(sparsify.save(model, tmp_path / "out"))
    assert plan.dense_bytes == found["dense"]
    assert plan.added_bytes.most == found["threshold"]


def test_errors_are_the_conversions(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    for method, allocation in (
        (sparsify.RSparse(sparsity=0.999, rho=0.5), None),
        (sparsify.Wina(sparsity=0.99), "sensitivity"),
        (sparsify.Cats(sparsity=0.9), None),
        (sparsify.Cats(sparsity=0.1), "greedy"),
        (sparsify.TopK(sparsity=0.5), "sensitivity"),
        (sparsify.Teal(sparsity=0.97), "greedy"),
        (Relu(), None),
    ):
        with pytest.raises(SparsifyError) as planned:
            plan_conversion(on_meta(tiny_llama), method, allocation=allocation)
        with pytest.raises(SparsifyError) as converted:
            sparsify.convert(copy.deepcopy(tiny_llama), method, tiny_calibration, allocation=allocation)
        assert str(planned.value) == str(converted.value)


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("shape", "shards", "parameters"),
    [(LLAMA_2_7B, 2, 6_738_415_616), (LLAMA_3_70B, 30, 70_553_706_496)],
    ids=["Llama-2-7B", "Llama-3-70B"],
)
def test_a_large_model_is_planned_without_its_weights(
    shape: dict[str, Any], shards: int, parameters: int, tmp_path: Path, header_only: Write
) -> None:
    folder = header_only(tmp_path / "large", LlamaConfig(**shape), shards=shards)
    before = resident()
    skeleton = read_skeleton(str(folder))
    plan = plan_conversion(skeleton.model, sparsify.RSparse(sparsity=0.5, rho=0.95))
    assert resident() - before < 100 << 20
    assert skeleton.stored_bytes == plan.dense_bytes == 2 * parameters
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    name = "model.layers.3.mlp.down_proj"
    kept = wide // 2
    rank = (kept * hidden - int(kept * 0.95) * hidden) // (hidden + wide)
    assert [c.rank for c in plan.options[name]] == [rank]
    assert not is_exact("auto", hidden, wide, rank)
    assert plan.added_bytes.least == plan.added_bytes.most
    # Nothing was read: the holes are still holes.
    assert sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors")) < 4 << 20


def test_headers_are_checked_before_anything_runs(tmp_path: Path, header_only: Write) -> None:
    config = LlamaConfig(**LLAMA_2_7B | {"num_hidden_layers": 2})
    folder = header_only(tmp_path / "short", config)
    config.num_hidden_layers = 3
    config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"no 'model\.layers\.2\..* incomplete"):
        read_skeleton(str(folder))
    config.num_hidden_layers, config.intermediate_size = 2, 4096
    config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"has the shape \[11008, 4096\], \[4096, 4096\] is expected"):
        read_skeleton(str(folder))


def test_the_dtype_is_the_one_of_a_load(tmp_path: Path, tiny_dense: Path, header_only: Write) -> None:
    for dtype in ("auto", "float32"):
        skeleton = read_skeleton(str(tiny_dense), dtype=dtype)
        model = sparsify.load_dense(str(tiny_dense), dtype=dtype)
        assert skeleton.model.dtype == model.dtype
        assert stored_dense_bytes(skeleton.model) == stored_dense_bytes(model)
    folder = header_only(tmp_path / "unsaid", LlamaConfig(**LLAMA_2_7B | {"num_hidden_layers": 1}))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_skeleton(str(folder)).model.dtype == torch.bfloat16


def test_a_hub_model_that_is_not_reachable_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.models.hub_problem", lambda: "no network here")
    with pytest.raises(UnavailableError, match=r"the hub was not reached \(no network here\) and .* `hf download`"):
        read_skeleton("nobody/nothing-of-this-name")


def test_headers_come_from_the_hub_where_only_the_config_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header_only: Write
) -> None:
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.utils import SafetensorsRepoMetadata

    shape = LLAMA_2_7B | {"num_hidden_layers": 1}
    there = header_only(tmp_path / "there", LlamaConfig(**shape))
    here = tmp_path / "here"
    here.mkdir()
    (here / "config.json").write_text((there / "config.json").read_text())
    held = parse_local_safetensors_file_metadata(there / "model.safetensors")
    answer = SafetensorsRepoMetadata(
        metadata=None, sharded=False, weight_map={}, files_metadata={"model.safetensors": held}
    )
    config = LlamaConfig.from_pretrained(there)
    monkeypatch.setattr("sparsify.skeleton.dense_config", lambda spec, **_: config)
    monkeypatch.setattr("sparsify.skeleton._local_files", lambda source: here)
    monkeypatch.setattr("sparsify.skeleton.hub_problem", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda source: answer)
    skeleton = read_skeleton("some/model")
    assert skeleton.read_from == "config and the headers of its weights on the hub"
    assert skeleton.stored_bytes == stored_dense_bytes(skeleton.model)
