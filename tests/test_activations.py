"""Each activation against its paper's equation in plain loops, its fitted numbers, and models that have it on disk."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

import sparsify
from sparsify import Calibration, SparsifyError
from sparsify.activations import (
    AFTER_NORMS_KINDS,
    KINDS,
    CRReLU,
    FatReLU,
    PolyNorm,
    PolyReLU,
    ShiftedReLU,
    is_zero_below,
    register,
    zero_up_to,
)
from sparsify.errors import CheckpointError
from sparsify.evals.relufication import with_won_back
from sparsify.methods.relu import Relu
from sparsify.reconstruction import Reconstruction, reconstruct
from sparsify.rectified import is_rectified
from sparsify.relu_cuts import cett_of_cuts, relu_cuts
from sparsify.relufication import ACTIVATIONS, Relufication, check_relufiable, relufy
from sparsify.rotation import rotation_problem
from sparsify.runtime import sparse_layers
from sparsify.zeros import nonzero_shares

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
_SPARSE = ("relu", "relu2", "fatrelu", "shifted_relu", "drelu")
MLP = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    """To be copied, not changed."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(1)), "random")


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(torch.arange(1, 17)[None], use_cache=False).logits
    return logits


def _relufied(dense: PreTrainedModel, how: Relufication | str, calibration: Calibration) -> Any:
    model = copy.deepcopy(dense)
    relufy(model, how, calibration)
    return model


def _set(module: nn.Module, **buffers: list[float] | float) -> nn.Module:
    for name, values in buffers.items():
        module.get_buffer(name).copy_(torch.tensor(values))
    return module


def _poly_norm(row: list[float], w: list[float]) -> list[float]:
    rms = [math.sqrt(sum(x ** (2 * i) for x in row) / len(row)) for i in (1, 2, 3)]
    return [sum(w[i - 1] * x**i / rms[i - 1] for i in (1, 2, 3)) + w[3] for x in row]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (_set(ShiftedReLU(), shift=0.25), lambda row: [max(x - 0.25, 0.0) for x in row]),
        (FatReLU(0.5), lambda row: [x if x > 0.5 else 0.0 for x in row]),
        (
            _set(PolyReLU(), coefficients=[0.1, 0.9, -0.2, 0.03]),
            lambda row: [0.1 + 0.9 * r - 0.2 * r**2 + 0.03 * r**3 for r in (max(x, 0.0) for x in row)],
        ),
        (_set(PolyNorm(), coefficients=[0.5, 0.3, -0.1, 0.2]), lambda row: _poly_norm(row, [0.5, 0.3, -0.1, 0.2])),
        (
            _set(CRReLU(), coefficients=[0.3]),
            lambda row: [max(x, 0.0) + 0.3 * x * math.exp(-(x**2) / 2) for x in row],
        ),
    ],
    ids=["shifted_relu", "fatrelu", "polyrelu", "polynorm", "crrelu"],
)
def test_the_function_is_the_papers(module: nn.Module, expected: Any) -> None:
    x = 1.5 * torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    x[0, :2] = torch.tensor([0.5, 0.25])
    torch.testing.assert_close(module(x), torch.tensor([expected(row) for row in x.tolist()]), rtol=1e-4, atol=1e-5)


def test_drelu_rectifies_both_halves(dense: PreTrainedModel, calibration: Calibration) -> None:
    mlp = _relufied(dense, "drelu", calibration).get_submodule(MLP)
    x = torch.randn(5, 32)
    gate, up, down = (linear.weight.detach() for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), ((x @ gate.T).relu() * (x @ up.T).relu()) @ down.T)


def test_stage_2_rectifies_what_attention_and_mlp_read(dense: PreTrainedModel, calibration: Calibration) -> None:
    model = _relufied(dense, Relufication(after_norms=True), calibration)
    assert model.config.rectified == [
        f"model.layers.{i}.{norm}" for i in range(2) for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    seen: dict[str, Tensor] = {}
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        module = model.get_submodule(f"model.layers.0.{name}")
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    _logits(model)
    x = model.model.embed_tokens(torch.arange(1, 17)[None])
    norm = dense.get_submodule("model.layers.0.input_layernorm")
    with torch.no_grad():
        torch.testing.assert_close(seen["self_attn.q_proj"], norm(x).relu())
    assert float(seen["mlp.up_proj"].min()) == 0.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_comes_back_the_same(
    activation: str, dense: PreTrainedModel, calibration: Calibration, tmp_path: Path
) -> None:
    model = _relufied(dense, activation, calibration)
    expected = _logits(model)
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(_logits(sparsify.load_dense(str(tmp_path / "plain"))), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    if activation == "drelu":
        with pytest.raises(SparsifyError, match=r"DReLU has ReLUs in other places.*sparsify\.load_dense"):
            _logits(loaded)
    else:
        assert torch.equal(_logits(loaded), expected)


@pytest.mark.parametrize("after_norms", [False, True], ids=["stage-1", "stage-2"])
@pytest.mark.parametrize("activation", _SPARSE)
def test_the_runtime_skips_its_zeros_and_loses_nothing(
    activation: str, after_norms: bool, dense: PreTrainedModel, calibration: Calibration, tmp_path: Path
) -> None:
    if after_norms and activation == "fatrelu":
        with pytest.raises(SparsifyError, match=r"goes with the activations relu, .*, not with fatrelu"):
            Relufication(activation, after_norms)
        return
    plain = _relufied(dense, Relufication(activation, after_norms), calibration)
    expected = _logits(plain)
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    read = nonzero_shares(plain, [*names, "model.layers.0.mlp.gate_proj"], calibration)
    model = sparsify.convert(copy.deepcopy(plain), Relu(), calibration)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-4)
    linears = {linear.name: linear for linear in sparsify.ledger_of(model).linears}
    for name in names:
        assert linears[name].density == pytest.approx(read[name], abs=1e-6)
    gate = linears["model.layers.0.mlp.gate_proj"].density
    assert gate == pytest.approx(read["model.layers.0.mlp.gate_proj"]) if after_norms else gate == 1.0
    folder = sparsify.save(model, tmp_path / "sparse")
    assert sparsify.verify(folder) == []
    for loaded in (sparsify.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(_logits(loaded), _logits(model))
    assert torch.equal(_logits(sparsify.load(folder, dense=True)), expected)


def test_rows_of_up_are_those_of_gates_above_the_shift(dense: PreTrainedModel, calibration: Calibration) -> None:
    plain = _relufied(dense, Relufication("shifted_relu", zeros=0.8), calibration)
    first = "model.layers.0.mlp.down_proj"
    assert nonzero_shares(plain, [first], calibration)[first] == pytest.approx(0.2, abs=0.003)
    model = sparsify.convert(plain, Relu(), calibration)
    up: Any = sparse_layers(model)[f"{MLP}.up_proj"]
    shift = float(model.get_submodule(MLP).act_fn.shift)
    assert shift > 0.0
    assert float(up.threshold) == shift
    x = torch.randn(7, 32)
    with torch.no_grad():
        assert torch.equal(up.keep(x), model.get_submodule(MLP).gate_proj(x) > shift)


def test_another_method_has_the_linears_that_relu_leaves(dense: PreTrainedModel, calibration: Calibration) -> None:
    plain = _relufied(dense, Relufication(after_norms=True), calibration)
    model = sparsify.convert(plain, Relu(0.7, others=sparsify.Teal(0.7)), calibration)
    entries = model.config.quantization_config.linears
    assert entries["model.layers.0.self_attn.q_proj"].sparsity == 0.7
    assert is_rectified(model.get_submodule("model.layers.0.input_layernorm"))
    assert rotation_problem(plain) == "a ReLU stands after its norms, which a rotation does not pass"


@pytest.mark.parametrize("activation", ["shifted_relu", "polyrelu", "polynorm", "crrelu"])
def test_fitted_numbers_are_better_than_any_near_them(
    activation: str, dense: PreTrainedModel, calibration: Calibration
) -> None:
    """The weighted error, written out, of the fitted numbers and of numbers beside them."""
    module = _relufied(dense, activation, calibration).get_submodule(MLP).act_fn
    mlp: Any = dense.get_submodule(MLP)
    seen: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for window in calibration.tokens:
        with torch.no_grad():
            dense(window[None], use_cache=False)
    handle.remove()
    x = torch.cat(seen).flatten(0, 1)
    with torch.no_grad():
        g, u = mlp.gate_proj(x), mlp.up_proj(x)
        weight = u.square() * mlp.down_proj.weight.square().sum(dim=0)

        def error() -> float:
            return float(((module(g) - nn.functional.silu(g)).square() * weight).double().sum())

        best = error()
        (name, numbers), *_ = module.named_buffers()
        for index in range(numbers.numel()):
            for step in (-0.03, 0.03):
                old = numbers.clone()
                numbers.view(-1)[index] += step
                assert error() > best, f"{name}[{index}] + {step}"
                numbers.copy_(old)


def test_the_cut_drops_what_its_cett_allows_and_no_less(dense: PreTrainedModel, calibration: Calibration) -> None:
    plain = _relufied(dense, "relu", calibration)
    mlps = check_relufiable(dense, "relu").mlps
    cuts = relu_cuts(plain, mlps, 0.3, calibration, shared=False)
    assert len(set(cuts.values())) == 2
    tails = cett_of_cuts(plain, mlps, {name: [t, 1.1 * t] for name, t in cuts.items()}, calibration)
    assert all(float(tail[0]) <= 0.3 < float(tail[1]) for tail in tails.values())
    # Written out for one MLP.
    mlp: Any = plain.get_submodule(MLP)
    seen: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for window in calibration.tokens:
        with torch.no_grad():
            plain(window[None], use_cache=False)
    handle.remove()
    with torch.no_grad():
        x = torch.cat(seen).flatten(0, 1)
        a = mlp.gate_proj(x).relu()
        h = a * mlp.up_proj(x)
        tail = mlp.down_proj(torch.where(a <= cuts[f"{MLP}.down_proj"], h, 0.0)).norm(dim=-1)
        cett = (tail / mlp.down_proj(h).norm(dim=-1)).mean()
    assert float(tails[f"{MLP}.down_proj"][0]) == pytest.approx(float(cett), rel=1e-4)
    model = sparsify.convert(plain, Relu(cett=0.3), calibration)
    for name, t in cuts.items():
        assert float(sparse_layers(model)[name.replace("down", "up")].threshold) == pytest.approx(t)
    assert model.config.quantization_config.method_config["cett"] == 0.3


def test_one_cut_is_for_all_and_as_the_dtype_has_it(dense: PreTrainedModel, calibration: Calibration) -> None:
    model = _relufied(copy.deepcopy(dense).to(torch.bfloat16), "fatrelu", calibration)
    cuts = {module.cut for module in model.modules() if isinstance(module, FatReLU)}
    assert cuts == {model.config.hidden_act_param}
    (cut,) = cuts
    assert cut > 0.0
    assert float(torch.tensor(cut).bfloat16()) == cut


@pytest.mark.parametrize(
    "how", [Relufication("drelu"), Relufication(after_norms=True), Relufication("fatrelu", cut=0.1)],
    ids=["drelu", "stage-2", "fatrelu"],
)  # fmt: skip
@pytest.mark.parametrize("inputs", ["converted", "dense"])
def test_the_fit_is_of_the_function_that_is_saved(
    how: Relufication, inputs: Any, dense: PreTrainedModel, calibration: Calibration, tmp_path: Path
) -> None:
    model = copy.deepcopy(dense)
    fit = Reconstruction(epochs=4, batch_tokens=32, inputs=inputs)
    done = reconstruct(model, how, fit, calibration, state=tmp_path / "state")
    assert all(one.error < 0.95 * one.swapped_error for one in done)
    again = copy.deepcopy(dense)
    assert reconstruct(again, how, fit, calibration, state=tmp_path / "state") == done
    assert torch.equal(_logits(model), _logits(again))
    # The first MLP's error from outside, on the dense model's inputs to it.
    if not how.after_norms:
        mlps: list[Any] = [m.get_submodule("model.layers.0.mlp") for m in (dense, model)]
        seen: list[Tensor] = []
        handle = mlps[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            for window in calibration.tokens:
                dense(window[None], use_cache=False)
            handle.remove()
            y, found = (mlp(torch.cat(seen)) for mlp in mlps)
        assert done[0].error == pytest.approx(float((found - y).square().mean() / y.square().mean()), rel=1e-3)


def test_without_sparsify_no_other_function_runs(
    dense: PreTrainedModel, calibration: Calibration, tmp_path: Path
) -> None:
    """transformers alone stops at each of our names."""
    names = [name for name in (*KINDS, *AFTER_NORMS_KINDS) if name not in ("relu", "relu2")]
    script = (
        "import sys\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"for name in {names!r}:\n"
        "    try:\n"
        "        LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,\n"
        "            num_attention_heads=1, hidden_act=name))\n"
        "    except KeyError as error:\n"
        "        assert name in str(error)\n"
        "    else:\n"
        "        sys.exit(f'{name} was taken')\n"
        "assert 'sparsify.activations' not in sys.modules\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "SPARSIFY_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_importing_sparsify_registers_the_names(repository: Path) -> None:
    script = (
        "import sparsify\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,\n"
        "    num_attention_heads=1, hidden_act='fatrelu', hidden_act_param=0.25))\n"
        "assert model.model.layers[0].mlp.act_fn.cut == 0.25\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_a_fatrelu_without_its_number_does_not_run() -> None:
    register()
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, hidden_act="fatrelu"))
    with pytest.raises(SparsifyError, match=r"fatrelu has no cut: .* has no hidden_act_param"):
        _logits(model)


@pytest.mark.parametrize("names", [["model.layers.9.mlp"], "all", [3]])
def test_rectified_names_in_a_file_are_checked(
    names: Any, dense: PreTrainedModel, calibration: Calibration, tmp_path: Path
) -> None:
    model = _relufied(dense, "drelu", calibration)
    model.config.rectified = names
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json has rectified .*, a list of modules of LlamaForCausalLM"):
        sparsify.load_dense(str(tmp_path))


def test_which_activations_have_zeros() -> None:
    found = {name: kind() for name, kind in KINDS.items() if name != "fatrelu"} | {"fatrelu": FatReLU(0.5)}
    assert {name for name, module in found.items() if is_zero_below(module)} == set(_SPARSE)
    assert [zero_up_to(found[name]) for name in _SPARSE] == [0.0, 0.0, 0.5, 0.0, 0.0]
    assert not is_zero_below(nn.SiLU())


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))


def _phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**_SIZES, pad_token_id=0))


@pytest.mark.parametrize(
    ("make", "said"),
    [(_gpt2, "the MLP of .*c_proj has no gate: use relu"), (_phi3, "has gate and up in one linear: use relu")],
)
def test_drelu_needs_two_halves(make: Any, said: str) -> None:
    with pytest.raises(SparsifyError, match=said):
        relufy(make().eval(), "drelu")


@pytest.mark.parametrize("make", [_gpt2, _phi3])
@pytest.mark.parametrize("activation", ["shifted_relu", "polynorm"])
def test_other_families_have_numbers_too(make: Any, activation: str, calibration: Calibration, tmp_path: Path) -> None:
    model = make().eval()
    relufy(model, activation, calibration)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(model))


@pytest.mark.parametrize(
    ("make", "norms"),
    [(_gpt2, ["ln_1", "ln_2"]), (_phi3, ["input_layernorm", "post_attention_layernorm"])],
    ids=["gpt2", "phi3"],
)
def test_other_families_have_norms_too(make: Any, norms: list[str], calibration: Calibration) -> None:
    model = make().eval()
    relufy(model, Relufication(after_norms=True))
    assert [name.rpartition(".")[2] for name in model.config.rectified] == 2 * norms
    attention = model.config.rectified[0].rpartition(".")[0]
    names = [name for name, module in model.named_modules() if name.startswith(attention) and "attn" in name]
    reader = next(name for name in names if name.endswith(("c_attn", "qkv_proj")))
    assert 0.3 < nonzero_shares(model, [reader], calibration)[reader] < 0.7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cut": 0.1}, "cut is for activation fatrelu, not for relu"),
        ({"activation": "fatrelu", "cut": -0.1}, "cut of a ReLU must be a finite number of at least 0, not -0.1"),
        ({"activation": "fatrelu", "cut": 0.1, "cett": 0.2}, "cut and cett both say where"),
        ({"activation": "fatrelu", "cett": 1.5}, r"cett is 1.5, it must be in \[0, 1\)"),
        ({"activation": "drelu", "zeros": 0.9}, "zeros is for activation shifted_relu, not for drelu"),
        ({"activation": "polyrelu", "after_norms": True}, "goes with the activations relu, .*, not with polyrelu"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsifyError, match=said):
        Relufication(**options)


def test_numbers_need_text(dense: PreTrainedModel) -> None:
    with pytest.raises(SparsifyError, match="the numbers of polyrelu are fitted on text: give a calibration"):
        relufy(copy.deepcopy(dense), "polyrelu")


def test_won_back_is_of_the_log_perplexity_that_the_swap_lost() -> None:
    rows = [{"name": "relu", "perplexity": 16.0}, {"name": "fit", "perplexity": math.sqrt(10.0 * 16.0)}]
    assert [row["won_back"] for row in with_won_back(10.0, rows)] == [0.0, pytest.approx(0.5)]
    assert [row["won_back"] for row in with_won_back(10.0, rows[1:])] == [None]
