"""What ReLU leaves, against the MLP's equation in plain loops; the native step, checkpoints, other methods beside."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

import sparsify
from sparsify import Calibration, SparsifyError, Teal
from sparsify.errors import CheckpointError
from sparsify.evals.realised import RealisedDensity
from sparsify.kernels import library
from sparsify.methods import get_method
from sparsify.methods.relu import Relu
from sparsify.native_decode import native_forward_of
from sparsify.native_plan import NativePlan
from sparsify.relu_layer import FatRelu, ReluUpLinear
from sparsify.runtime import sparse_layers

MLP = "model.layers.1.mlp"
VOCABULARY = 64


def _llama(dtype: torch.dtype = torch.float32, activation: str = "relu") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, hidden_act=activation, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def _opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        max_position_embeddings=64, word_embed_proj_dim=64, init_std=0.2,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def _phi3() -> Phi3ForCausalLM:
    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, hidden_act="relu", initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


@pytest.fixture
def calibration() -> Calibration:
    return Calibration(torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1)), "random")


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("cut", [0.0, 0.3])
def test_output_is_fatrelu_written_out(calibration: Calibration, cut: float) -> None:
    model = sparsify.convert(_llama(), Relu(cut=cut), calibration)
    mlp: Any = model.get_submodule(MLP)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    gate, up, down = (layer.weight.detach().double() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    expected, active = torch.zeros(5, 64, dtype=torch.float64), 0
    for n, row in enumerate(x.double()):
        for i in range(len(gate)):
            g = float(gate[i] @ row)
            if g > cut:
                active += 1
                expected[n] += down[:, i] * g * float(up[i] @ row)
    assert 0.2 < active / (5 * len(gate)) < 0.6
    with torch.no_grad():
        torch.testing.assert_close(mlp(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [_llama, _opt, _phi3], ids=["gated", "ungated", "fused"])
def test_nothing_is_lost_without_a_cut(make: Any, calibration: Calibration, tokens: Tensor) -> None:
    dense = make()
    model = sparsify.convert(copy.deepcopy(dense), Relu(), calibration)
    for layer in sparse_layers(model).values():
        layer.bind("reference")
    assert torch.equal(_logits(model, tokens), _logits(dense, tokens))
    for layer in sparse_layers(model).values():
        layer.bind()
    torch.testing.assert_close(_logits(model, tokens), _logits(dense, tokens), rtol=1e-4, atol=1e-4)
    with sparsify.dense(model):
        torch.testing.assert_close(_logits(model, tokens), _logits(dense, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "cut", "rows"), [(_llama, 0.2, True), (_opt, 0.2, False), (_phi3, 0.0, False)],
    ids=["gated", "ungated", "fused"],
)  # fmt: skip
def test_the_ledger_counts_the_neurons_that_are_active(
    make: Any, cut: float, rows: bool, calibration: Calibration
) -> None:
    model = make()
    shares: dict[str, list[float]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, y, name=name: shares.setdefault(name, []).append(float((y > cut).double().mean()))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    for window in calibration.tokens:
        _logits(model, window[None])
    for handle in handles:
        handle.remove()
    sparsify.convert(model, Relu(cut=cut), calibration)
    ledger = sparsify.ledger_of(model)
    expected = sum(linear.dense_bytes for linear in ledger.linears)
    for mlp in model.config.quantization_config.neurons.mlps:
        share = sum(shares[mlp.activation]) / len(shares[mlp.activation])
        cut_linears = [mlp.up, mlp.down] if rows else [mlp.down]
        for linear in ledger.linears:
            if linear.name in cut_linears:
                assert linear.density == pytest.approx(share, abs=1e-6)
                # The threshold is read, too.
                expected += 4 - (1.0 - share) * linear.dense_bytes
    assert ledger.touched_bytes == pytest.approx(expected)


def test_realised_density_is_of_rows_and_columns(calibration: Calibration) -> None:
    model = sparsify.convert(_llama(), Relu(cut=0.2), calibration)
    with RealisedDensity(model) as realised:
        for window in calibration.tokens:
            _logits(model, window[None])
    found, entries = realised.densities(), model.config.quantization_config.linears
    # The first MLP sees what it saw in calibration; the second sees what the first one's cut changed.
    assert found["model.layers.0.mlp.up_proj"] == pytest.approx(entries["model.layers.0.mlp.up_proj"].density)
    assert found[f"{MLP}.up_proj"] == pytest.approx(found[f"{MLP}.down_proj"], abs=1e-3)
    assert found[f"{MLP}.gate_proj"] == 1.0


def test_errors_are_of_what_the_cut_drops(calibration: Calibration) -> None:
    without = sparsify.convert(_llama(), Relu(), calibration).config.quantization_config.linears
    cut = sparsify.convert(_llama(), Relu(cut=0.3), calibration).config.quantization_config.linears
    assert {entry.error for entry in without.values()} == {0.0}
    assert 0.0 < cut[f"{MLP}.down_proj"].error < 0.5


@pytest.mark.skipif(library.load() is None, reason=library.missing() or "")
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (Relu(), torch.float32),
        (Relu(), torch.bfloat16),
        (Relu(cut=0.3), torch.float32),
        (Relu(cut=0.3), torch.bfloat16),
        # In bfloat16 a sum in another order moves channels over Teal's thresholds.
        (Relu(0.4, 0.1, Teal(0.4)), torch.float32),
    ],
    ids=["relu", "relu-bf16", "fatrelu", "fatrelu-bf16", "+teal"],
)
def test_the_native_step_reads_active_rows_and_writes_the_same(
    method: Relu, dtype: torch.dtype, calibration: Calibration, tokens: Tensor
) -> None:
    model = sparsify.convert(_llama(dtype), method, calibration)
    assert native_forward_of(model) is not None
    plan = NativePlan(model)
    assert [(bool(b.up.by_rows), bool(b.cut)) for b in plan.blocks] == [(True, True)] * 2
    native = model.generate(
        tokens[:1], max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for layer in sparse_layers(model).values():
        layer.bind("reference")
    plain = model.generate(
        tokens[:1], max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    for found, expected in zip(native.logits[:8], plain.logits[:8], strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(library.load() is None, reason=library.missing() or "")
def test_the_native_step_reads_no_row_of_an_inactive_neuron(calibration: Calibration, tokens: Tensor) -> None:
    """Rows of up that nobody needs may hold anything: NaN in them would show."""
    model: Any = sparsify.convert(_llama(), Relu(cut=0.3), calibration)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        cache = model(input_ids=tokens[:1, :4], use_cache=True).past_key_values

        def step() -> Tensor:
            logits: Tensor = model(input_ids=tokens[:1, 4:5], past_key_values=copy.deepcopy(cache)).logits
            return logits

        before = step()
        seen: list[Tensor] = []
        handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        step()
        handle.remove()
        unused = ~mlp.up_proj.keep(seen[0]).flatten()
        assert 10 < int(unused.sum()) < 90
        mlp.up_proj.weight[unused] = float("nan")
        assert torch.equal(step(), before)
        with sparsify.dense(model):
            assert step().isnan().any()


@pytest.mark.parametrize("cut", [0.0, 0.25])
def test_it_comes_back_bit_equal(cut: float, calibration: Calibration, tokens: Tensor, tmp_path: Path) -> None:
    dense = _logits(_llama(), tokens)
    model = sparsify.convert(_llama(), Relu(cut=cut), calibration)
    expected = _logits(model, tokens)
    folder = sparsify.save(model, tmp_path / "relu")
    assert sparsify.verify(folder) == []
    for loaded in (sparsify.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert isinstance(loaded.get_submodule(f"{MLP}.act_fn"), FatRelu)
        assert torch.equal(_logits(loaded, tokens), expected)
        assert sparsify.ledger_of(loaded) == sparsify.ledger_of(model)
    again = sparsify.save(sparsify.load(folder), tmp_path / "again")
    assert sparsify.load(again).config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert torch.equal(_logits(sparsify.load(folder, dense=True), tokens), dense)


def test_a_cut_below_0_in_a_file_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    model = sparsify.convert(_llama(), Relu(), calibration)
    up = model.get_submodule(f"{MLP}.up_proj")
    assert isinstance(up, ReluUpLinear)
    up.threshold.fill_(-1.0)
    folder = sparsify.save(model, tmp_path / "relu")
    with pytest.raises(CheckpointError, match=r"up_proj\.threshold holds the cut -1 of a ReLU, it must be at least 0"):
        sparsify.load(folder)


def test_another_activation_in_the_file_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    folder = sparsify.save(sparsify.convert(_llama(), Relu(), calibration), tmp_path / "relu")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"hidden_act": "relu"', '"hidden_act": "silu"'))
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.act_fn' is not ReLU"):
        sparsify.load(folder)


def test_another_method_has_the_other_linears(calibration: Calibration, tokens: Tensor) -> None:
    method = get_method("relu+teal").configure(sparsity=0.4, cut=0.1)
    assert method == Relu(0.4, 0.1, Teal(0.4))
    model = sparsify.convert(_llama(), method, calibration)
    alone = sparsify.convert(_llama(), Teal(0.4), calibration)
    layers, expected = sparse_layers(model), sparse_layers(alone)
    config = model.config.quantization_config
    assert (config.method, config.sparsity) == ("relu+teal", 0.4)
    for name, layer in layers.items():
        if name.endswith(("up_proj", "down_proj")):
            assert float(layer.threshold) == pytest.approx(0.1 if name.endswith("up_proj") else 0.0)
        else:
            assert config.linears[name].sparsity == 0.4
            assert torch.equal(layer.threshold, expected[name].threshold)
    assert not torch.equal(_logits(model, tokens), _logits(_llama(), tokens))


def test_auto_beside_relu_keeps_its_own_ways(calibration: Calibration) -> None:
    method = get_method("relu+auto").configure(sparsity=0.4)
    model = sparsify.convert(_llama(), method, calibration)
    config = model.config.quantization_config
    assert (config.method, config.allocation, config.rotated) == ("relu+auto", "sensitivity", True)
    ledger = sparsify.ledger_of(model)
    others = [linear for linear in ledger.linears if not linear.name.endswith(("up_proj", "down_proj"))]
    saved = 1.0 - sum(linear.touched_bytes for linear in others) / sum(linear.dense_bytes for linear in others)
    assert saved == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(
    ("make", "method", "options", "said"),
    [
        (lambda: _llama(activation="silu"), Relu(), {}, "no block of LlamaForCausalLM has one: its MLPs have SiLU"),
        (_phi3, Relu(cut=0.1), {}, r"cut of 0.1 cannot be made in .*gate_up_proj, which holds gate and up in one"),
        (_llama, Relu(), {"allocation": "greedy"}, "allocation greedy is for the linears of another method"),
        (_llama, Relu(), {"rotate": True}, "rotate is for the linears of another method"),
    ],
    ids=["silu", "fused-cut", "allocation", "rotate"],
)  # fmt: skip
def test_what_cannot_be_had(
    make: Any, method: Relu, options: dict[str, Any], said: str, calibration: Calibration
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsifyError, match=said):
        sparsify.convert(model, method, calibration, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not sparse_layers(model)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("relu", {"sparsity": 0.5}, "sparsity 0.5 cannot be asked of method relu"),
        ("relu", {"cut": -0.5}, "cut of a ReLU must be a finite number of at least 0, not -0.5"),
        ("relu", {"cut": float("nan")}, "not nan"),
        ("relu+cats", {}, "'relu\\+cats' cannot be combined"),
        ("teal+relu", {}, "'teal\\+relu' cannot be combined"),
        ("relu+teel", {}, "unknown method 'teel'.*Did you mean"),
        ("relu+teal", {"sparsity": 0.5, "others": None}, "takes no option 'others'"),
        ("relu+teal", {}, "teal needs the option 'sparsity'"),
    ],
)
def test_bad_settings_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsifyError, match=said):
        get_method(name).configure(**options)
