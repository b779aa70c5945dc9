"""MLPs whose neurons are chosen: found in every family, equal to hooks on the dense model, and checked when loaded."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsify
from sparsify import Calibration, Cats, Griffin, Teal
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.evals.realised import RealisedDensity
from sparsify.mlp_layer import GateLinear, PromptDownConv1D, PromptRowsConv1D
from sparsify.mlp_targets import find_mlps
from sparsify.prompt_choice import PromptChoices, follow_prompts
from sparsify.runtime import sparse_layers
from sparsify.targets import find_targets

WIDE = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GATED = {
    "llama": ("LlamaConfig", {"intermediate_size": 80}),
    "gemma2": ("Gemma2Config", {"intermediate_size": 80, "head_dim": 16, "num_key_value_heads": 1}),
    "phi3": ("Phi3Config", {"intermediate_size": 80}),
}
UNGATED = {
    "gpt2": ("GPT2Config", {"n_inner": 80}),
    "gpt-neo": ("GPTNeoConfig", {"intermediate_size": 80, "attention_types": [[["global", "local"], 1]]}),
    "opt": ("OPTConfig", {"ffn_dim": 80, "word_embed_proj_dim": 32}),
}
TOKENS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(3))


def _model(family: str) -> PreTrainedModel:
    name, options = (GATED | UNGATED)[family]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(getattr(transformers, name)(**WIDE, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model


def _mlps(model: PreTrainedModel) -> Any:
    return find_mlps(model, find_targets(model, TOKENS[:1]), TOKENS[:1])


def _convert(model: PreTrainedModel, method: Any) -> Any:
    return sparsify.convert(model, method, Calibration(TOKENS, "random tokens"))


def _logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tokens, **options).logits
    return found


@pytest.mark.parametrize("family", [*GATED, *UNGATED])
def test_found_by_structure(family: str) -> None:
    found = _mlps(_model(family))
    assert len(found) == 2
    for mlp in found:
        assert mlp.neurons == 80
        assert (mlp.gate is not None) == (family in GATED)
        assert mlp.fused == (family == "phi3")
        assert len({mlp.up, mlp.down, mlp.activation}) == 3


@pytest.mark.parametrize("family", GATED)
def test_cats_is_a_cut_of_the_dense_models_activations(family: str) -> None:
    dense = _model(family)
    model = _convert(copy.deepcopy(dense), Cats(sparsity=0.25))
    layers, expected_share = sparse_layers(model), []
    for mlp in _mlps(dense):
        layer: Any = layers[mlp.gate]
        assert isinstance(layer, GateLinear)

        def cut(module: Any, args: Any, y: Tensor, t: float = float(layer.threshold)) -> Tensor:
            expected_share.append(float((y.abs() > t).float().mean()))
            return torch.where(y.abs() > t, y, 0.0)

        dense.get_submodule(mlp.activation).register_forward_hook(cut)
    expected = _logits(dense, TOKENS, use_cache=False)
    with RealisedDensity(model) as realised:
        torch.testing.assert_close(_logits(model, TOKENS, use_cache=False), expected, rtol=1e-4, atol=1e-4)
    found = realised.densities()
    for mlp, share in zip(_mlps(_model(family)), expected_share, strict=True):
        assert found[mlp.down] == pytest.approx(share, abs=1e-6)
        # A fused linear's first half is the gate, which is touched in full.
        assert found[mlp.up] == pytest.approx((1 + share) / 2 if mlp.fused else share, abs=1e-6)
    assert sparsify.ledger_of(model).weighted_sparsity == pytest.approx(0.25)


@pytest.mark.parametrize("family", [*GATED, *UNGATED])
def test_griffin_is_a_mask_on_what_enters_the_dense_models_down(family: str, tmp_path: Path) -> None:
    dense: Any = _model(family)
    model = _convert(copy.deepcopy(dense), Griffin(sparsity=0.3))
    layers, handles = sparse_layers(model), []
    masks: dict[str, Tensor] = {}
    for mlp in _mlps(dense):

        def choose(module: Any, args: Any, down: str = mlp.down, k: int = int(layers[mlp.down].threshold)) -> Any:
            h = args[0].reshape(2, -1, args[0].shape[-1])
            if down not in masks:
                s = (h / h.norm(dim=-1, keepdim=True)).norm(dim=1)
                masks[down] = torch.zeros_like(s).scatter(1, s.topk(k).indices, 1.0)
                return None
            return ((h * masks[down][:, None]).reshape(args[0].shape),)

        handles.append(dense.get_submodule(mlp.down).register_forward_pre_hook(choose))
    prompt, rest = TOKENS[:, :12], TOKENS[:, 12:13]
    results = []
    for each in (dense, model, sparsify.load(sparsify.save(model, tmp_path / "griffin"))):
        with torch.inference_mode():
            cache = each(prompt, use_cache=True).past_key_values
            results.append(each(rest, past_key_values=cache, use_cache=True).logits)
    assert not torch.allclose(results[0], _logits(_model(family), TOKENS)[:, 12:13], atol=1e-3)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(results[1], results[2])
    assert (
        masks[_mlps(_model(family))[0].down].sum(-1).tolist() == [layers[_mlps(_model(family))[0].down].threshold] * 2
    )


def test_conv1d() -> None:
    model = _convert(_model("gpt2"), Griffin(sparsity=0.3))
    layers = sparse_layers(model)
    assert type(layers["transformer.h.0.mlp.c_fc"]) is PromptRowsConv1D
    assert type(layers["transformer.h.0.mlp.c_proj"]) is PromptDownConv1D


@pytest.mark.parametrize("family", UNGATED)
def test_cats_refuses_a_model_without_a_gate(family: str) -> None:
    model = _model(family)
    with pytest.raises(SparsifyError, match=r"no block of .* has a gated MLP, .*: use method griffin or teal"):
        _convert(model, Cats(sparsity=0.2))
    assert not sparse_layers(model)


@pytest.mark.parametrize("method", [Cats(sparsity=0.2), Griffin(sparsity=0.2)], ids=lambda method: method.name)
def test_experts_are_no_mlps(method: Any) -> None:
    config = transformers.MixtralConfig(**WIDE, intermediate_size=80, num_key_value_heads=1)
    with pytest.raises(SparsifyError, match="no block of MixtralForCausalLM has a"):
        _convert(AutoModelForCausalLM.from_config(config).eval(), method)


def test_a_shared_expert_is_an_mlp_and_routed_experts_are_not() -> None:
    options = {
        "intermediate_size": 80,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 64,
        "num_key_value_heads": 1,
    }
    config = transformers.Qwen2MoeConfig(**WIDE, **options, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config).eval()
    assert [mlp.neurons for mlp in _mlps(dense)] == [64, 64]
    model: Any = _convert(copy.deepcopy(dense), Griffin(sparsity=0.2))
    assert torch.equal(_logits(model, TOKENS), _logits(dense, TOKENS))
    # Its tokens come flattened, and still each sequence chooses by itself.
    generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    alone = model.generate(TOKENS[1:], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated[1:, : alone.shape[1]], alone)


def test_an_mlp_that_sees_some_tokens_cannot_choose() -> None:
    choices = PromptChoices()
    follow_prompts(model := torch.nn.Identity(), choices)
    model.register_forward_pre_hook(lambda _, args: choices.add("experts.0", torch.ones(5, 8)))
    with pytest.raises(SparsifyError, match=r"experts\.0 sees 5 of 6 tokens"):
        model(torch.ones(2, 3))


@pytest.fixture(scope="module")
def folders(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tiny_dense by each method, saved; to be read only."""
    out = {}
    for method in (Cats(sparsity=0.35), Griffin(sparsity=0.35)):
        model = sparsify.load_dense(str(tiny_dense))
        calibration = Calibration(torch.randint(model.config.vocab_size, (2, 32)), "random tokens")
        sparsify.convert(model, method, calibration)
        out[method.name] = sparsify.save(model, tmp_path_factory.mktemp("neurons") / method.name)
    return out


GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))


def _number(name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{name}.threshold"] = torch.tensor(value)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def _mlp(**values: Any) -> Callable[[Path], None]:
    return _config(lambda config: config["neurons"]["mlps"][0].update(values))


HOSTILE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "t is NaN": ("cats", _number(GATE, float("nan")), "not finite"),
    "t is negative": ("cats", _number(GATE, -0.5), r"gate_proj.threshold holds the threshold -0\.5 of magnitudes"),
    "up has a threshold": ("cats", _number(UP, 0.5), r"up_proj.threshold holds 0\.5, it must be -1"),
    "down has a threshold": ("cats", _number(DOWN, 0.5), r"down_proj.threshold holds 0\.5, it must be 0"),
    "k is no integer": ("griffin", _number(DOWN, 3.5), r"holds k = 3\.5, it must be an integer in \[1, 96\]"),
    "k is 0": ("griffin", _number(DOWN, 0.0), "holds k = 0"),
    "k is beyond the MLP": ("griffin", _number(UP, 97.0), "holds k = 97"),
    "k is infinite": ("griffin", _number(UP, float("inf")), "not finite"),
    "k is not the density's": ("griffin", _number(GATE, 5.0), "holds k = 5 of 96, its configuration has the density"),
    "no such linear": ("cats", _mlp(up="model.layers.9.mlp.up_proj"), "is not a converted linear of its own"),
    "down is an attention's": (
        "cats",
        _mlp(down="model.layers.0.self_attn.o_proj"),
        "o_proj has 64 columns, its MLP 96",
    ),
    "a linear twice": ("cats", _mlp(gate=DOWN), "down_proj is named twice"),
    "another's linear": ("griffin", _mlp(gate="model.layers.1.mlp.gate_proj"), "is not a converted linear of its own"),
    "neurons are not the linears'": ("griffin", _mlp(neurons=95), "has 96 rows, its MLP 95 neurons"),
    "the activation is the model": ("cats", _mlp(activation="model"), "'model' is no activation function"),
    "no activation": ("cats", _mlp(activation="model.layers.0.mlp.act"), "is no activation function"),
    "no gate": ("cats", _config(lambda c: c["neurons"]["mlps"][0].pop("gate")), "it has no gate"),
    "an unknown cut": ("cats", _config(lambda c: c["neurons"].update(cut="top-p")), "cut"),
    "an unknown key": ("cats", _mlp(sideways=1), "unknown key 'sideways'"),
    "no mapping": ("cats", _config(lambda c: c.update(neurons=[1])), "neurons"),
    "an MLP that is a number": ("cats", _config(lambda c: c["neurons"].update(mlps=[3])), "expected a mapping"),
    "a rank": (
        "griffin",
        _config(lambda c: c["linears"][UP].update(rank=2)),
        "without another cut, scales and low rank",
    ),
    "another cut": ("griffin", _config(lambda c: c["linears"][UP].update(cut="top-k")), "without another cut"),
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
    assert any(problem for problem in sparsify.verify(folder) if "manifest" not in problem)


def test_a_fast_backend_is_refused(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        with pytest.raises(SparsifyError, match="backend 'native' does not run MLPs whose neurons are chosen"):
            sparsify.load(folder, backend="native")
        assert sparse_layers(sparsify.load(folder, backend="reference"))


def test_other_methods_files_know_nothing_of_it(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    sparsify.convert(tiny_llama, Teal(sparsity=0.5), tiny_calibration)
    assert "neurons" not in tiny_llama.config.quantization_config.to_dict()


def test_casts_do_not_round_the_threshold(folders: dict[str, Path]) -> None:
    before = sparse_layers(sparsify.load(folders["cats"]))[GATE].threshold
    assert before.bfloat16().float() != before
    for layer in (
        sparse_layers(sparsify.load(folders["cats"], dtype="float32"))[GATE],
        sparse_layers(sparsify.load(folders["cats"]))[GATE].to(torch.float16),
    ):
        assert layer.threshold.dtype == torch.float32
        assert torch.equal(layer.threshold, before)
