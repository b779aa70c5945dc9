"""Layers with a cut that depends on the token: saved, loaded, checked, moved, copied, counted, and what they refuse."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import sparsify
from sparsify import Calibration, StatisticalTopK, Teal, TopK
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.evals.decoding import Side, count
from sparsify.evals.realised import RealisedDensity
from sparsify.methods import Method
from sparsify.native_decode import native_forward_of
from sparsify.runtime import set_prefill, sparse_layers
from sparsify.token_layer import MeanStdConv1D, MeanStdLinear, TopKConv1D, TopKLinear

METHODS = [TopK(sparsity=0.5), StatisticalTopK(sparsity=0.5)]
CUTS = {"topk": "top-k", "statistical-topk": "mean-std"}
Q = "model.layers.0.self_attn.q_proj"
TOKENS = torch.arange(32).reshape(2, 16)

by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tokens).logits
    return found


@pytest.fixture(scope="module")
def folders(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tiny_dense in bf16 by each method, saved; to be read only."""
    out = {}
    for method in METHODS:
        model = sparsify.load_dense(str(tiny_dense))
        calibration = Calibration(torch.randint(model.config.vocab_size, (4, 32)), "random tokens")
        sparsify.convert(model, method, calibration)
        out[method.name] = sparsify.save(model, tmp_path_factory.mktemp("cuts") / method.name)
    return out


@pytest.fixture(params=list(CUTS))
def saved(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


class TestCheckpoint:
    def test_it_comes_back(self, saved: Path, tmp_path: Path) -> None:
        model, plain = sparsify.load(saved), AutoModelForCausalLM.from_pretrained(saved)
        assert {type(layer) for layer in sparse_layers(model).values()} <= {TopKLinear, MeanStdLinear}
        assert torch.equal(logits(model), logits(plain))
        again = sparsify.load(sparsify.save(model, tmp_path / "again"))
        before, after = model.state_dict(), again.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(logits(model), logits(again))
        assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
        assert {entry.cut for entry in model.config.quantization_config.linears.values()} == {CUTS[saved.name]}
        assert sparsify.verify(saved) == sparsify.verify(tmp_path / "again") == []

    def test_without_sparsify_it_is_the_dense_model(self, folders: dict[str, Path], tiny_dense: Path) -> None:
        code = (
            "import sys, torch\n"
            "from transformers import AutoModelForCausalLM\n"
            "def logits(folder):\n"
            "    with torch.inference_mode():\n"
            "        model = AutoModelForCausalLM.from_pretrained(folder)\n"
            "        return model(torch.arange(32).reshape(2, 16)).logits\n"
            "dense, *cut = map(logits, sys.argv[1:])\n"
            "assert all(torch.equal(dense, other) for other in cut) and 'sparsify' not in sys.modules\n"
        )
        arguments = [str(tiny_dense), *map(str, folders.values())]
        environment = os.environ | {"SPARSIFY_AUTOLOAD": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, cwd="/", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def test_other_methods_files_know_nothing_of_it(
        self, tiny_llama: PreTrainedModel, tiny_calibration: Calibration
    ) -> None:
        sparsify.convert(tiny_llama, Teal(sparsity=0.5), tiny_calibration)
        entries = tiny_llama.config.quantization_config.to_dict()["linears"].values()
        assert all("cut" not in entry for entry in entries)

    def test_in_another_dtype_the_cuts_number_stays(self, saved: Path) -> None:
        layers = sparse_layers(sparsify.load(saved)).values()
        expected = [layer.threshold.clone() for layer in layers]
        others = sparse_layers(sparsify.load(saved, dtype="float32")).values()
        for layer, other, number in zip(layers, others, expected, strict=True):
            for moved in (layer.to(torch.float16), other):
                assert moved.threshold.dtype == torch.float32
                assert torch.equal(moved.threshold, number)
                assert moved.backend.name == "reference"

    def test_a_fast_backend_is_refused(self, saved: Path) -> None:
        with pytest.raises(SparsifyError, match="backend 'native' does not run a cut that depends on the token"):
            sparsify.load(saved, backend="native")
        assert sparse_layers(sparsify.load(saved, backend="reference"))


def _number(value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{Q}.threshold"] = torch.as_tensor(value)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _entry(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["linears"][Q][key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


HOSTILE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "k is no integer": ("topk", _number(3.5), r"holds k = 3\.5, it must be an integer in \[1, 64\]"),
    "k is 0": ("topk", _number(0.0), "holds k = 0"),
    "k is beyond the linear": ("topk", _number(65.0), "holds k = 65"),
    "k is NaN": ("topk", _number(float("nan")), "not finite"),
    "k is stored as int64": ("topk", _number(31), "stored as I64, F32 is expected"),
    "k is not the density's": ("topk", _number(32.0), "holds k = 32 of 64, its configuration has the density"),
    "the density is not k's": ("topk", _entry("density", 0.75), "its configuration has the density 0.75"),
    "z is beyond any score": ("statistical-topk", _number(8.5), r"holds z = 8\.5, it must be in \[-8, 8\]"),
    "z is infinite": ("statistical-topk", _number(float("inf")), "not finite"),
    "z as k": ("statistical-topk", _entry("cut", "top-k"), "it must be an integer"),
    "k as z": ("topk", _entry("cut", "mean-std"), "holds z = 31"),
    "the cut is unknown": ("topk", _entry("cut", "top-p"), "cut"),
    "the cut is a number": ("topk", _entry("cut", 3), "cut"),
    "the cut is a list": ("topk", _entry("cut", ["top-k"]), "cut"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_are_one_clear_error(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    method, change, message = HOSTILE[case]
    folder = Path(shutil.copytree(folders[method], tmp_path / "checkpoint"))
    change(folder)
    for load in (sparsify.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message) as refusal:
            load(folder)
        assert "\n" not in str(refusal.value)
    assert any("Q" in problem or "q_proj" in problem for problem in sparsify.verify(folder))


class TestRunning:
    @by_method
    def test_dense_prefill_and_copies(
        self, method: Method, tiny_llama: PreTrainedModel, tiny_calibration: Calibration
    ) -> None:
        expected = logits(tiny_llama)
        model = sparsify.convert(tiny_llama, method, tiny_calibration)
        sparse = logits(model)
        assert not torch.allclose(sparse, expected, atol=1e-3)
        with sparsify.dense(model):
            assert torch.equal(logits(model), expected)
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied), sparse)
        set_prefill(copied, "dense")
        assert torch.equal(logits(copied), expected)
        assert torch.equal(logits(model), sparse), "the copy has its own switch"

    @by_method
    def test_each_token_is_cut_by_itself(
        self, method: Method, tiny_llama: PreTrainedModel, tiny_calibration: Calibration
    ) -> None:
        model = sparsify.convert(tiny_llama, method, tiny_calibration)
        assert native_forward_of(model) is None
        whole = logits(model)
        with torch.inference_mode():
            prompt: Any = model(TOKENS[:, :15], use_cache=True)
            step: Any = model(TOKENS[:, 15:], past_key_values=prompt.past_key_values)
        torch.testing.assert_close(torch.cat([prompt.logits, step.logits], dim=1), whole, rtol=1e-4, atol=1e-4)

    @by_method
    def test_moves_through_meta_and_training(
        self, method: Method, tiny_llama: PreTrainedModel, tiny_calibration: Calibration
    ) -> None:
        model = sparsify.convert(tiny_llama, method, tiny_calibration)
        layer = sparse_layers(model)[Q]
        x = torch.randn(3, 64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad != 0, layer.keep(x))
        assert layer.to("meta").threshold.is_meta

    @pytest.mark.parametrize(
        ("method", "kind"), [(METHODS[0], TopKConv1D), (METHODS[1], MeanStdConv1D)], ids=list(CUTS)
    )
    def test_conv1d(self, method: Method, kind: type, tiny_calibration: Calibration) -> None:
        config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=64)
        model = AutoModelForCausalLM.from_config(config).eval()
        expected = logits(model)
        sparsify.convert(model, method, tiny_calibration)
        assert {type(layer) for layer in sparse_layers(model).values()} == {kind}
        with sparsify.dense(model):
            torch.testing.assert_close(logits(model), expected)
        layer = next(iter(sparse_layers(model).values()))
        x = torch.randn(5, 32)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), torch.where(layer.keep(x), x, 0.0) @ layer.weight + layer.bias)


class TestCounting:
    @by_method
    def test_realised_density_and_a_steps_union(
        self, method: Method, tiny_llama: PreTrainedModel, tiny_calibration: Calibration
    ) -> None:
        model = sparsify.convert(tiny_llama, method, tiny_calibration)
        entries = model.config.quantization_config.linears
        with RealisedDensity(model) as realised:
            logits(model, tiny_calibration.tokens)
        found = realised.densities()
        if method.name == "topk":
            assert found == {name: entry.density for name, entry in entries.items()}
        else:
            # The first linear's input is what it was in calibration, whatever is sparse behind it.
            assert found[Q] == pytest.approx(entries[Q].density, abs=0.005)
        seen: list[Tensor] = []
        handle = sparse_layers(model)[Q].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        side = Side("sparse", "", model, "transformers", run_dense=False)
        counted = count(side, tiny_calibration.tokens[:3, :9], 8)
        handle.remove()
        united = sparse_layers(model)[Q].keep(seen[-1]).flatten(0, -2)
        assert counted.token[Q] == pytest.approx(float(united.float().mean()))
        assert counted.step[Q] == pytest.approx(float(united.any(0).float().mean()))


@by_method
@pytest.mark.parametrize("allocation", ["greedy", "sensitivity"])
def test_allocations_by_thresholds_refuse(
    method: Method, allocation: str, tiny_llama: PreTrainedModel, tiny_calibration: Calibration
) -> None:
    with pytest.raises(SparsifyError, match=f"allocation {allocation} .* {method.name} cuts each token by itself"):
        sparsify.convert(tiny_llama, method, tiny_calibration, allocation=allocation)
    assert not sparse_layers(tiny_llama)
