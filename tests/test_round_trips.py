"""Saving what was loaded, in every way that transformers has: bit for bit the same checkpoint, or refused.

Every kind of sparse layer, in shards, tied, in each dtype, spread over memory and disk, through a push to a hub that is
a folder here, and by a process that does not know sparsify.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import sparsify
from sparsify.checkpoint import LEDGER
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.manifest import MANIFEST
from sparsify.methods.auto import Auto
from sparsify.methods.cats import Cats
from sparsify.methods.griffin import Griffin
from sparsify.methods.larosa import Larosa
from sparsify.methods.relu import Relu
from sparsify.methods.statistical_topk import StatisticalTopK
from sparsify.methods.teal import Teal
from sparsify.methods.topk import TopK
from sparsify.methods.wina import Wina
from sparsify.runtime import sparse_layers

METHODS: dict[str, tuple[Any, bool]] = {
    "teal": (Teal(0.5), False),
    "wina": (Wina(0.5), False),
    "rsparse": (sparsify.RSparse(0.5, rho=0.8), False),
    "compensated": (Teal(0.5, compensate=True), False),
    "rotated": (Teal(0.5), True),
    "rotated-by-layer": (Larosa(0.5, rotation="layer"), False),
    "larosa": (Larosa(0.5, rotation="model"), False),
    "topk": (TopK(0.5), False),
    "statistical-topk": (StatisticalTopK(0.5), False),
    "cats": (Cats(0.3), False),
    "griffin": (Griffin(0.3), False),
    "relu": (Relu(), False),
    "relu+teal": (Relu(0.3, others=Teal(0.3)), False),
    "auto": (Auto(0.5), False),
}
TOKENS = torch.arange(3, 19)[None]
# One block in memory, the other and the last norm on the disk.
SPREAD = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "disk", "lm_head": "cpu",
}  # fmt: skip


def _convert(name: str, out: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, tie_word_embeddings=tied, dtype=dtype, bos_token_id=0,
        eos_token_id=1, hidden_act="relu" if name.startswith("relu") else "silu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    method, rotate = METHODS[name]
    sparsify.convert(model, method, sparsify.Calibration(torch.randint(64, (2, 32)), "random tokens"), rotate=rotate)
    return sparsify.save(model, out)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("round")
    return {name: _convert(name, folder / name) for name in METHODS}


def _logits(model: Any) -> Tensor:
    """Returns the logits of a prompt and of a step after it, which runs sparse where the prompt runs dense.

    Of a copy: torch's products round by where in a page a weight lies, which is anywhere while it is a file's.
    """
    model = model if hasattr(model, "hf_device_map") else copy.deepcopy(model)
    with torch.inference_mode():
        prompt = model(TOKENS[:, :8], use_cache=True)
        step = model(TOKENS[:, 8:9], past_key_values=prompt.past_key_values)
        return torch.cat([prompt.logits, step.logits], dim=1)


def _stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _is_the_same(folder: Path, original: Path) -> None:
    """Checks that both folders store the same bits, and load as the same model."""
    found, expected = _stored(folder), _stored(original)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert (
            torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
            if tensor.dim()
            else found[name] == tensor
        ), name
    again, model = sparsify.load(folder), sparsify.load(original)
    assert len(sparse_layers(again)) == len(sparse_layers(model)) > 0
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert torch.equal(_logits(again), _logits(model))


@pytest.mark.parametrize("name", METHODS)
class TestEveryKindOfLayer:
    def test_in_shards(self, name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoints[name])
        model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
        assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
        _is_the_same(tmp_path / "again", checkpoints[name])
        # transformers' own writer leaves no manifest, so nothing claims that this folder is as sparsify wrote it.
        with pytest.raises(CheckpointError, match=f"no {MANIFEST}"):
            sparsify.verify(tmp_path / "again")

    @pytest.mark.parametrize("buffers", [False, True], ids=["buffers-in-memory", "buffers-on-disk"])
    def test_spread_over_memory_and_disk(
        self, name: str, buffers: bool, checkpoints: dict[str, Path], tmp_path: Path
    ) -> None:
        options = {"device_map": SPREAD, "offload_folder": tmp_path / "offload", "offload_buffers": buffers}
        if buffers and name in ("rotated-by-layer", "relu", "relu+teal"):
            with pytest.raises(SparsifyError, match="without offload_buffers=True"):
                AutoModelForCausalLM.from_pretrained(checkpoints[name], **options)
            return
        model = AutoModelForCausalLM.from_pretrained(checkpoints[name], **options)
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        assert sum(parameter.is_meta for parameter in model.parameters()) >= 9
        # The block on the disk runs by the reference kernel, which sums in another order than the others.
        assert torch.allclose(_logits(model), _logits(sparsify.load(checkpoints[name])), atol=1e-5)
        model.save_pretrained(tmp_path / "again")
        _is_the_same(tmp_path / "again", checkpoints[name])
        out = sparsify.save(model, tmp_path / "whole")
        assert sparsify.verify(out) == []
        assert (out / LEDGER).read_bytes() == (checkpoints[name] / LEDGER).read_bytes()
        _is_the_same(out, checkpoints[name])

    def test_through_a_push(
        self, name: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub = tmp_path / "hub"
        _make_hub(hub, monkeypatch)
        sparsify.load(checkpoints[name]).push_to_hub("me/tiny")
        assert {"config.json", "model.safetensors"} <= {path.name for path in hub.iterdir()}
        _is_the_same(hub, checkpoints[name])


@pytest.mark.parametrize("name", ["rsparse", "rotated-by-layer", "cats"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tied_in_shards_and_spread(name: str, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    original = _convert(name, tmp_path / "original", tied=tied, dtype=dtype)
    assert sparsify.verify(original) == []
    assert ("lm_head.weight" in _stored(original)) != tied
    model = AutoModelForCausalLM.from_pretrained(original, device_map=SPREAD, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    _is_the_same(tmp_path / "again", original)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loaded", ["float32", "bfloat16", "float16"])
def test_loaded_in_another_dtype(stored: torch.dtype, loaded: str, tmp_path: Path) -> None:
    original = _convert("rsparse", tmp_path / "original", dtype=stored)
    model = sparsify.load(original, dtype=loaded)
    out = sparsify.save(model, tmp_path / "again")
    assert sparsify.verify(out) == []
    again = sparsify.load(out)
    assert again.dtype == getattr(torch, loaded)
    assert torch.equal(_logits(again), _logits(model))
    before = _stored(original)
    for name, tensor in _stored(out).items():
        exact = name.endswith(("threshold", "scale"))
        assert tensor.dtype == (torch.float32 if exact else getattr(torch, loaded))
        assert torch.equal(tensor, before[name].to(tensor.dtype))


def test_device_map_auto_with_too_little_memory(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = sparsify.load(
        checkpoints["rsparse"], device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=tmp_path / "offload"
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    out = sparsify.save(model, tmp_path / "again")
    assert sparsify.verify(out) == []
    _is_the_same(out, checkpoints["rsparse"])


def test_conv1d_with_tied_embeddings(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = sparsify.Calibration(torch.randint(64, (2, 32)), "random tokens")
    original = sparsify.save(sparsify.convert(model, Teal(0.5, compensate=True), tokens), tmp_path / "original")
    assert sparsify.verify(original) == []
    AutoModelForCausalLM.from_pretrained(original).save_pretrained(tmp_path / "again", max_shard_size="10KB")
    _is_the_same(tmp_path / "again", original)


def test_saved_by_a_process_without_sparsify(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The added tensors are lost there: the folder is refused as a sparse one, and is the dense model still."""
    code = (
        "import json, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "for source, target in json.loads(sys.argv[1]).items():\n"
        "    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, max_shard_size='10KB')\n"
        "sys.exit('sparsify' in sys.modules)\n"
    )
    folders = {str(folder): str(tmp_path / name) for name, folder in checkpoints.items()}
    environment = os.environ | {"SPARSIFY_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(folders)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, folder in checkpoints.items():
        for load in (sparsify.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(CheckpointError, match="saved again without sparsify"):
                load(tmp_path / name)
        dense = sparsify.load_dense(str(tmp_path / name))
        assert torch.equal(_logits(dense), _logits(sparsify.load(folder, dense=True)))


def test_saved_over_the_checkpoint_is_named_by_verify(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["compensated"], tmp_path / "checkpoint"))
    model: Any = sparsify.load(folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(folder)
    problems = sparsify.verify(folder)
    assert "model.safetensors: the tensor 'model.norm.weight' was changed (CRC-32 differs)" in problems
    assert all(problem.startswith("model.safetensors") for problem in problems)


def _make_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets what is pushed to the hub be written to a folder."""

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("a card")

    def commit(self: Any, *, operations: list[Any], **options: Any) -> None:
        for operation in operations:
            path = folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Path(operation.path_or_fileobj).read_bytes())

    def make(self: Any, repo_id: str, **options: Any) -> huggingface_hub.RepoUrl:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", make)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **options: Card())
