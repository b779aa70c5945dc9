"""`sparsify measure`: the same numbers in both formats, the checkpoint of --out, and one error for each mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import sparsify

Run = Any


@pytest.fixture
def flags(text_file: Path) -> list[str]:
    return ["--text", str(text_file), "--seq-len", "32", "--limit", "4"]


@pytest.fixture(scope="module")
def wide_model(dense_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense_model with ten times its weights: its perplexity depends on its neurons."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    model = sparsify.load_dense(str(dense_model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    sparsify.load_tokenizer(str(dense_model)).save_pretrained(folder)
    return folder


def measured(run: Run, *arguments: str | Path) -> dict[str, Any]:
    result = run("measure", *arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_a_curve_over_several_p(run: Run, wide_model: Path, flags: list[str]) -> None:
    data = measured(run, wide_model, "--ppl-p", "5%,0.5%", "--rule", "cett,top-k,fatrelu,zero", *flags)
    assert data["metric"] == "PPL-p% sparsity"
    points = [(point["rule"], point["p"]) for point in data["points"]]
    assert points == [*((rule, p) for rule in ("cett", "top-k", "fatrelu") for p in (0.005, 0.05)), ("zero", None)]
    assert all(point["rise"] <= (point["p"] or 0.0) for point in data["points"])
    assert all(len(point["layers"]) == 2 for point in data["points"])
    assert data["points"][0]["sparsity"] <= data["points"][1]["sparsity"]
    # What another run needs to repeat or to doubt a number.
    assert len(data["model_sha256"]) == len(data["dense"]["text_sha256"]) == 64
    assert data["cett_text"]["text_sha256"] == data["dense"]["text_sha256"]
    assert data["environment"]["versions"]["sparsify"] == sparsify.__version__
    assert data["settings"]["limit"] == 4
    assert data["pads"] == 0


def test_human_output_fits_and_is_saved_as_json(run: Run, dense_model: Path, flags: list[str], tmp_path: Path) -> None:
    save = tmp_path / "measure.json"
    result = run("measure", dense_model, "--ppl-p", "1%", "--rule", "cett,zero", *flags, "--save", save)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    point = json.loads(save.read_text())["points"][0]
    assert f"{100 * point['sparsity']:.2f}%" in result.stdout
    assert f"{100 * point['layers'][1]['activation_ratio']:.1f}%" in result.stdout
    assert "dynamic dead neuron" in " ".join(result.stdout.split())


def test_the_checkpoint_of_out_is_what_was_measured(
    run: Run, wide_model: Path, text_file: Path, flags: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "sparse"
    data = measured(run, wide_model, "--ppl-p", "2%", "--cett-text", text_file, *flags, "--out", out)
    assert data["out"] == str(out)
    assert sparsify.verify(out) == []
    assert yaml.safe_load((out / "sparsify.yaml").read_text())["method"] == "ppl-p"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "ppl-p" in card
    assert "| sparse | " in card
    evaluated = json.loads(run("eval", out, *flags, "--backend", "reference", "--format", "json").stdout)["models"][0]
    point = data["points"][0]
    assert evaluated["sparse"]["nll_per_token"] == point["nll_per_token"]
    assert evaluated["dense"]["nll_per_token"] == pytest.approx(data["dense"]["nll_per_token"], rel=1e-6)
    inspected = json.loads(run("inspect", out, "--format", "json").stdout)
    assert inspected["method_config"]["p"] == 0.02
    # The thresholds' own bytes and the scales' are in the ledger.
    ratios = [layer["activation_ratio"] for layer in point["layers"]]
    assert evaluated["realised_sparsity"] == pytest.approx(1 - sum(ratios) / 2, abs=0.05)


def test_a_checkpoint_is_measured_as_its_dense_model(
    run: Run, dense_model: Path, checkpoint: Path, flags: list[str]
) -> None:
    first = measured(run, dense_model, "--ppl-p", "1%", *flags)
    second = measured(run, checkpoint, "--ppl-p", "1%", *flags)
    assert second["points"] == first["points"]


def test_padded_documents_leave_their_pads_out(run: Run, dense_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "documents.jsonl"
    documents = ["def mean(values):\n    return sum(values)", "pass", "x", "class Line:\n    pass\n" * 9]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    data = measured(run, dense_model, "--padded", "--text", text, "--seq-len", "24", "--ppl-p", "5%")
    lengths = [len(AutoTokenizer.from_pretrained(dense_model)(document)["input_ids"]) for document in documents]
    real = sum(min(length, 24) for length in lengths if length > 1)
    windows = data["dense"]["windows"]
    assert windows == sum(length > 1 for length in lengths) < 4
    assert data["cett_text"]["tokens"] == real
    assert data["dense"]["tokens"] == real - windows
    assert data["pads"] == windows * data["dense"]["seq_len"] - real > 0


BAD = {
    "p zero": (["--ppl-p", "0%"], ["--ppl-p 0%", "above 0", "1%"]),
    "p negative": (["--ppl-p", "-1%"], ["-1%", "above 0"]),
    "p a word": (["--ppl-p", "abc"], ["abc", "1%"]),
    "p without a sign": (["--ppl-p", "1%,5"], ["'5'", "1%"]),
    "no p": (["--ppl-p", ""], ["--ppl-p", "1%"]),
    "unknown rule": (["--rule", "cet"], ["cet", "Did you mean 'cett'"]),
    "unknown scope": (["--scope", "mlps"], ["mlps", "linears"]),
    "out for several": (["--ppl-p", "1%,5%", "--out", "new"], ["--out new", "one --ppl-p"]),
    "out for another rule": (["--rule", "top-k", "--out", "new"], ["--out new", "cett"]),
    "no text": (["--text", "none.txt"], ["none.txt"]),
    "no cett text": (["--cett-text", "none.txt"], ["none.txt"]),
    "window too long": (["--seq-len", "300"], ["300", "256"]),
    "no windows": (["--limit", "0"], ["windows", "0"]),
    "a token": (["--seq-len", "1"], ["seq_len"]),
    "no tokens": (["--seq-len", "0"], ["seq_len"]),
    "no batch": (["--batch-size", "0"], ["batch size"]),
    "no folder for --save": (["--save", "none/x.json"], ["none/x.json"]),
}


def expect_error(result: Any, words: list[str]) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_options(
    run: Run, dense_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], words: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    text = [] if "--text" in arguments else ["--text", str(text_file)]
    expect_error(run("measure", dense_model, *text, *arguments), words)
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short(run: Run, dense_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("two words")
    expect_error(run("measure", dense_model, "--text", text, "--seq-len", "128"), ["too short", "--seq-len"])
    text.write_text("a")
    expect_error(run("measure", dense_model, "--text", text, "--padded"), ["too short", "another text"])


def test_an_existing_folder_is_kept(run: Run, dense_model: Path, tmp_path: Path) -> None:
    expect_error(run("measure", dense_model, "--out", tmp_path), ["exists already"])


def test_a_model_without_mlps(run: Run, dense_model: Path, flags: list[str], tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    AutoTokenizer.from_pretrained(dense_model).save_pretrained(tmp_path / "experts")
    expect_error(run("measure", tmp_path / "experts", *flags), ["has no MLP", "--scope linears"])
    data = measured(run, tmp_path / "experts", *flags, "--scope", "linears", "--ppl-p", "5%")
    assert data["metric"] == "PPL-p% channel sparsity"
    assert "left dense" in " ".join(data["left_out"])


def test_convert_to_a_rise_of_perplexity_by_neurons(
    run: Run, wide_model: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ppl"
    flags = ["--calibration", str(text_file), "--seq-len", "16", "--sequences", "2", "--held-out", "2"]
    result = run(
        "convert", wide_model, "--method", "ppl-p", "--max-ppl-increase", "5%", *flags, "--eval-windows", "0",
        "--out", out, "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    budget = json.loads(result.stdout)["budget"]
    assert (budget["kind"], budget["max_increase"]) == ("ppl-p", 0.05)
    assert 0.0 < budget["points"][0]["sparsity"] < 1.0
    assert budget["increase"] <= 0.05
    assert run("verify", out).exit_code == 0
    model = sparsify.load(str(out))
    assert model.config.quantization_config.method == "ppl-p"
    assert all("down_proj" in name for name in model.config.quantization_config.linears)
    # The settings in the checkpoint repeat it.
    again = tmp_path / "again"
    assert run("convert", "--config", out / "sparsify.yaml", "--out", again).exit_code == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    text = run("convert", "--config", out / "sparsify.yaml", "--out", tmp_path / "human").stdout
    assert "of MLP neurons to" in " ".join(text.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "0.5"], "give --max-ppl-increase"),
        (["--max-ppl-increase", "1%", "--rho", "0.9", "--rotate"], "leave --rho, --rotate out"),
        (["--max-ppl-increase", "1%", "--sparsity", "0.5"], "leave --sparsity out"),
    ],
)
def test_convert_by_neurons_takes_no_bytes(run: Run, wide_model: Path, flags: list[str], message: str) -> None:
    result = run("convert", wide_model, "--method", "ppl-p", *flags, "--out", "nowhere")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
