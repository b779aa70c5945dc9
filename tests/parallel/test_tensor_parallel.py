"""Converted models over 2 and 4 processes, as torchrun starts them: what one process computes, in parts.

One launch of each size measures every checkpoint; the tests look at what its processes wrote down.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config

import sparsify
from sparsify.linear import SparseLayer
from sparsify.methods import available, get_method
from sparsify.methods.auto import Auto
from sparsify.methods.cats import Cats
from sparsify.methods.griffin import Griffin
from sparsify.methods.larosa import Larosa
from sparsify.methods.relu import Relu
from sparsify.methods.statistical_topk import StatisticalTopK
from sparsify.methods.teal import Teal
from sparsify.methods.topk import TopK
from sparsify.methods.wina import Wina

# Each launch takes the imports of its processes.
pytestmark = pytest.mark.slow

_SCRIPT = Path(__file__).with_name("divided_models.py")
# fp32 sums in another order; a channel that sat so near its threshold that it is kept in one and dropped in the other
# would show a hundred times as much.
_TOLERANCE = 2e-5
_RSPARSE = sparsify.RSparse(0.5, rho=0.8)
# Llama with biases everywhere has one at o and down, too, which are added once.
_BIASED = {"attention_bias": True, "mlp_bias": True}
RIGHT: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "teal": (Teal(0.5), LlamaConfig, {}),
    "wina": (Wina(0.5), LlamaConfig, {}),
    "rsparse": (_RSPARSE, LlamaConfig, {}),
    "rsparse-biased": (_RSPARSE, LlamaConfig, _BIASED),
    "compensated": (Wina(0.5, compensate=True), LlamaConfig, _BIASED),
    "relu": (Relu(0.3, others=Teal(0.3)), LlamaConfig, {"hidden_act": "relu"}),
    "cats": (Cats(0.3), LlamaConfig, {}),
    "qwen2-teal": (Teal(0.5), Qwen2Config, {}),
    "qwen2-wina": (Wina(0.5), Qwen2Config, {}),
    "qwen2-rsparse": (_RSPARSE, Qwen2Config, {}),
    "auto": (Auto(0.5), LlamaConfig, {}),
    # q, k and v, and gate and up, in one linear each: whole outputs, and whole inputs, in every process.
    "phi3-rsparse": (_RSPARSE, Phi3Config, {"pad_token_id": 0}),
    "qwen2-relu": (Relu(cut=0.2), Qwen2Config, {"hidden_act": "relu"}),
}
REFUSED: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "topk": (TopK(0.5), LlamaConfig, {}),
    "statistical-topk": (StatisticalTopK(0.5), LlamaConfig, {}),
    "larosa": (Larosa(0.5, rotation="layer"), LlamaConfig, {}),
    "griffin": (Griffin(0.3), LlamaConfig, {}),
    # Gate and up in one linear: a half of its rows is not one of each.
    "phi3-cats": (Cats(0.3), Phi3Config, {"pad_token_id": 0}),
}


def _convert(method: Any, config: type, own: dict[str, Any], out: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4, initializer_range=0.3, bos_token_id=0, eos_token_id=None, dtype=torch.float32, **own,
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    sparsify.convert(model, method, sparsify.Calibration(torch.randint(64, (2, 32)), "random tokens"))
    sparsify.save(model, out)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    for name, (method, config, own) in {**RIGHT, **REFUSED}.items():
        _convert(method, config, own, folder / name)
    return folder


@pytest.fixture(scope="module")
def script() -> Any:
    """The module that the processes run."""
    spec = importlib.util.spec_from_file_location("divided_models", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(checkpoints: Path, script: Any) -> dict[str, dict[str, Any]]:
    """What one process computes."""
    return {name: script.measured(AutoModelForCausalLM.from_pretrained(checkpoints / name)) for name in RIGHT}


@pytest.fixture(scope="module", params=[2, 4], ids=["2-processes", "4-processes"])
def launch(request: pytest.FixtureRequest, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each process of a launch has written what it computed."""
    out = tmp_path_factory.mktemp(f"of-{request.param}")
    # A free port is the launcher's to find.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    ended = subprocess.run(
        [*command, str(_SCRIPT), str(checkpoints), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def divided(launch: Path) -> list[dict[str, dict[str, Any]]]:
    """What each process computed."""
    return [torch.load(path, weights_only=True) for path in sorted(launch.glob("*.pt"))]


@pytest.mark.parametrize("name", RIGHT)
class TestInParts:
    def test_logits_are_those_of_one_process(
        self, name: str, divided: list[dict[str, dict[str, Any]]], alone: dict[str, dict[str, Any]]
    ) -> None:
        expected = alone[name]
        # What is dropped shows in the logits by far more than what is tolerated.
        assert (expected["sparse"][:, :8] - expected["dense"][:, :8]).abs().max() > 1e4 * _TOLERANCE
        for process in divided:
            for side in ("sparse", "dense", "gradient"):
                torch.testing.assert_close(process[name][side], expected[side], rtol=_TOLERANCE, atol=_TOLERANCE)

    def test_generation_is_the_same(
        self, name: str, divided: list[dict[str, dict[str, Any]]], alone: dict[str, dict[str, Any]]
    ) -> None:
        assert len(set(alone[name]["generated"][0].tolist())) > 8
        for process in divided:
            assert torch.equal(process[name]["generated"], alone[name]["generated"])
            assert not process[name]["native"]

    def test_every_process_holds_its_part(
        self, name: str, divided: list[dict[str, dict[str, Any]]], checkpoints: Path
    ) -> None:
        # No process reads a tensor whole to cut it.
        assert all(process[name]["read_in_part"]["weight"] for process in divided)
        assert all(all(process[name]["read_in_part"].values()) for process in divided)
        stored, count = load_file(checkpoints / name / "model.safetensors"), len(divided)
        for process in divided:
            for linear, shapes in process[name]["shapes"].items():
                by_inputs = linear.endswith(("o_proj", "down_proj"))
                cut = (
                    {"weight": 1, "scale": 0, "lr_a": 1}
                    if by_inputs
                    else {"weight": 0, "bias": 0, "lr_b": 0, "sparse_bias": 0}
                )
                for key, shape in shapes.items():
                    whole = list(stored[f"{linear}.{key}"].shape)
                    if key in cut:
                        whole[cut[key]] //= count
                    assert shape == whole, (linear, key)

    def test_what_the_processes_save_is_what_they_loaded(self, name: str, launch: Path, checkpoints: Path) -> None:
        before = load_file(checkpoints / name / "model.safetensors")
        after = load_file(launch / f"saved-{name}" / "model.safetensors")
        assert after.keys() == before.keys()
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype
            assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize("name", REFUSED)
def test_what_chooses_among_all_channels_is_refused(name: str, divided: list[dict[str, dict[str, Any]]]) -> None:
    for process in divided:
        error = process[name]["error"]
        assert f"method {name.removeprefix('phi3-')} cannot run under tensor parallelism: model.layers.0." in error
        assert f"{', '.join(name for name, about in available().items() if about.facts.tensor_parallel)} can" in error


def test_the_facts_of_the_methods_say_what_is_refused() -> None:
    for name, (method, _, _) in RIGHT.items():
        assert get_method(method.name).facts.tensor_parallel, name
    for name, (method, config, _) in REFUSED.items():
        assert get_method(method.name).facts.tensor_parallel == (config is Phi3Config), name


def test_other_ways_to_divide_are_refused(divided: list[dict[str, dict[str, Any]]]) -> None:
    for process in divided:
        assert f"is {len(divided)}: converted models are divided by tensor parallelism only" in process["fsdp"]["error"]
        assert "'model.layers.0.self_attn.q_proj' as 'packed_colwise'" in process["packed"]["error"]
        assert "write it with save_pretrained" in process["teal"]["refused"]


def test_layers_of_one_process_have_no_part(checkpoints: Path) -> None:
    model = sparsify.load(checkpoints / "teal")
    assert all(layer.part is None for layer in model.modules() if isinstance(layer, SparseLayer))
