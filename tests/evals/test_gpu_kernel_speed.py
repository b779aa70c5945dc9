"""The table of the GPU kernels: complete, consistent, and no times for kernels that are wrong. Times are made up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("triton")

from sparsify.errors import SparsifyError
from sparsify.evals import gpu_kernel_speed as module
from sparsify.evals import teal_kernel
from sparsify.evals.gpu_bench import Bench
from sparsify.evals.gpu_kernel_speed import MODELS, Block, kernel_speed, low_rank_speed, main, mlp_speed, site_speed
from sparsify.evals.gpu_kernel_table import table
from sparsify.evals.gpu_timing import Site
from sparsify.kernels.gpu import site as site_module

WriteTeal = Callable[..., Path]
BLOCK = Block(hidden=32, queries=32, keys=16, neurons=64)
OUTPUTS = Site("o", 128, (64,))


@pytest.fixture
def bench(cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench on the CPU, with a model of 32 channels and R-Sparse at rank 2."""
    monkeypatch.setitem(MODELS, "tiny", BLOCK)
    monkeypatch.setattr(module, "RANK", 2)
    return cpu_bench


def side(found: dict[str, Any], form: str, sparsity: float) -> dict[str, Any]:
    (one,) = [s for s in found["sides"] if (s["form"], s["sparsity"]) == (form, sparsity)]
    return dict(one)


def test_the_shapes_are_the_models() -> None:
    """Parameters of the blocks' linears, from the papers' numbers of parameters less embeddings and norms."""
    sizes = {name: sum(s.nbytes(torch.float16) // 2 for s in block.sites()) for name, block in MODELS.items()}
    assert sizes == {"llama-2-7b": 202375168, "llama-3-8b": 218103808, "llama-3.2-1b": 60817408}
    assert [site.name for site in BLOCK.sites()] == ["qkv", "o", "gate_up", "down"]
    assert [site.gated for site in BLOCK.sites()] == [False, False, False, True]


def test_a_site_in_both_forms(bench: Bench) -> None:
    found = site_speed(bench, OUTPUTS, torch.bfloat16, 1)
    assert [(s["form"], s["sparsity"]) for s in found["sides"]] == [
        ("masked", 0.0), ("indexed", 0.0), ("masked", 0.5), ("indexed", 0.5), ("torch", 0.0),
    ]  # fmt: skip
    size = 128 * 64 * 2
    for number, one in enumerate(found["sides"]):
        ms = number + 1
        assert one["bytes"] == pytest.approx(one["kept"] * size)
        assert one["kept"] == pytest.approx(1 - one["sparsity"], abs=0.01)
        assert one["ms"] == {"median": ms, "p10": ms, "p90": ms}
        assert one["gb_per_second"] == pytest.approx(one["bytes"] / ms / 1e6)
        assert one["speedup"]["median"] == pytest.approx(1 / ms)
        assert one["over_dense"]["median"] == pytest.approx(5 / ms)
        # The copy moves 2000 bytes in 6 ms.
        assert one["share_of_copy"]["median"] == pytest.approx(one["bytes"] / ms / (2000 / 6))
    assert found["copy_gb_per_second"]["median"] == pytest.approx(2000 / 6e-3 / 1e9)


def test_several_tokens_touch_the_union(bench: Bench) -> None:
    found = site_speed(bench, OUTPUTS, torch.bfloat16, 4)
    assert side(found, "masked", 0.5)["kept"] == pytest.approx(1 - 0.5**4, abs=0.06)


def test_a_wrong_kernel_is_not_timed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = site_module.run_site

    def wrong(*args: Any, **options: Any) -> list[Tensor]:
        y = right(*args, **options)
        return [1.1 * part for part in y] if options["indexed"] else y

    monkeypatch.setattr(site_module, "run_site", wrong)
    found = site_speed(bench, OUTPUTS, torch.float32, 1)
    for one in found["sides"]:
        assert ("problem" in one) == (one["form"] == "indexed")
        assert ("ms" in one) == (one["form"] != "indexed")
    assert side(found, "indexed", 0.5)["problem"] == "wrong by 1.0e-01, where 3e-05 is allowed"


def test_ratios_to_a_side_without_times_are_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_module, "run_site", lambda *args, **options: 1 / 0)
    found = site_speed(bench, OUTPUTS, torch.float32, 1)
    assert side(found, "masked", 0.0)["problem"] == "ZeroDivisionError: division by zero"
    assert side(found, "torch", 0.0)["speedup"] is None
    assert side(found, "torch", 0.0)["over_dense"]["median"] == 1.0


def test_low_rank_is_compared_at_the_same_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, int]] = []
    tensors = module.SiteCopies.tensors

    def note(self: Any, sparsity: float, *, rank: int = 0, scaled: bool = False) -> Any:
        asked.append((sparsity, rank))
        assert scaled
        return tensors(self, sparsity, rank=rank, scaled=scaled)

    monkeypatch.setattr(module.SiteCopies, "tensors", note)
    found = low_rank_speed(bench, OUTPUTS, torch.bfloat16, 1)
    low = 2 * (128 + 64) * 2
    assert asked == [(0.5, 2), (0.5 - low / 16384, 0), (0.7, 2), (0.7 - low / 16384, 0)]
    assert [row["low_rank_bytes"] for row in found] == [low, low]
    assert found[0]["low_rank_ms"]["median"] == 1.0
    assert found[0]["ratio"]["median"] == 0.5


def test_low_rank_that_reads_more_than_all_channels_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RANK", 32)
    assert [row["sparsity"] for row in low_rank_speed(bench, Site("o", 128, (64,)), torch.bfloat16, 1)] == []
    monkeypatch.setattr(module, "RANK", 25)
    assert [row["sparsity"] for row in low_rank_speed(bench, Site("o", 128, (64,)), torch.bfloat16, 1)] == [0.7]


# In bf16 one flipped threshold of 64 is more than what is allowed.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_mlp_as_a_whole(bench: Bench, dtype: torch.dtype) -> None:
    found = mlp_speed(bench, BLOCK, dtype, 2)
    assert [(s["form"], s["sparsity"]) for s in found["sides"]] == [("ours", 0.0), ("ours", 0.5), ("torch", 0.0)]
    assert not any("problem" in s for s in found["sides"])
    assert side(found, "torch", 0.0)["bytes"] == 32 * 64 * 3 * dtype.itemsize


def test_the_whole_document(
    bench: Bench,
    write_teal: WriteTeal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, activations = tmp_path / "kernels.json", tmp_path / "x.safetensors"
    save_file({"qkv": torch.randn(3, 32), "down": torch.randn(3, 2, 64)}, activations)
    monkeypatch.setattr(module, "_bench", lambda args: bench)
    # Of TEAL's three sparsities one is enough here.
    monkeypatch.setattr(teal_kernel, "TEAL_SPARSITIES", (0.5,))
    flags = ["--model", "tiny", "--dtype", "float16", "--activations", str(activations), "--save", str(saved)]
    assert main([*flags, "--teal", str(write_teal())]) == 0
    said = capsys.readouterr()
    document = json.loads(saved.read_text())
    assert said.out == table(document) + "\n"
    assert [line.split()[0] for line in said.err.splitlines()] == [str(n) for n in range(12, -1, -1)]
    assert [(entry["model"], entry["name"], entry["tokens"]) for entry in document["sites"]] == [
        ("tiny", name, 1) for name in ("qkv", "o", "gate_up", "down")
    ]
    assert len(document["low_rank"]) == 8
    assert len(document["teal"]) == 4
    assert (document["dtype"], document["inputs"], document["tiles"]) == ("float16", "recorded", "any")
    assert "problem" not in saved.read_text()
    for words in (
        "| tiny gate_up, 1 tok. | masked | 50% | 50.0% |",
        "× TEAL",
        "| tiny MLP, 1 tok. | ours |",
        "extra |",
    ):
        assert words in said.out


def test_results_are_handed_out_as_they_come(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def stop(document: dict[str, Any]) -> None:
        seen.append(len(json.dumps(document)))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernel_speed(bench, ["tiny"], torch.bfloat16, partial=stop)
    assert seen[0] < seen[1]


def test_nothing_is_begun_when_the_time_is_over(bench: Bench) -> None:
    times = iter([0.0, 1.0, 2.0, 10.0])
    found = kernel_speed(bench, ["tiny"], torch.bfloat16, seconds=5, clock=lambda: next(times))
    assert ([entry["name"] for entry in found["sites"]], found["mlp"], found["left"]) == (["qkv", "o"], [], 7)
    assert table(found).splitlines()[-1] == "The time ended with 7 measurements left."


def test_teal_that_cannot_be_imported_is_recorded(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "sparse_gemv.py").write_text("import there_is_no_such_package")
    monkeypatch.setattr(module, "_bench", lambda args: bench)
    monkeypatch.setattr(module, "kernel_speed", lambda *args, **options: kernel_speed(bench, [], torch.bfloat16))
    assert main(["--teal", str(tmp_path), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["teal"]
    assert "No module named 'there_is_no_such_package'" in entry["problem"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 4, "timed on a GPU, and there is none here"),
        (["--sparsity", "1.0"], 2, "--sparsity is in [0, 1)"),
        (["--rounds", "0"], 2, "--rounds at least 1"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    flags: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if code == 4 and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(flags) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "tokens", "words"),
    [
        (["llama-3-9b"], [1], "unknown model 'llama-3-9b'.*Did you mean 'llama-3-8b'"),
        (["llama-3-8b"], [9], r"the numbers of tokens are \[9\], they must be from 1 to 8"),
        (["llama-3-8b"], [], "the numbers of tokens are"),
    ],
)
def test_bad_input(bench: Bench, models: list[str], tokens: list[int], words: str) -> None:
    with pytest.raises(SparsifyError, match=words):
        kernel_speed(bench, models, torch.bfloat16, tokens=tokens)


def test_activations_of_unknown_sites(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"router": torch.zeros(1, 64)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(module, "_bench", lambda args: bench)
    assert main(["--model", "tiny", "--activations", str(tmp_path / "x.safetensors")]) == 2
    assert "holds router; it may hold down, gate_up, o, qkv" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "small", Block(hidden=1024, queries=1024, keys=256, neurons=2048))
    device = torch.device("cuda", torch.cuda.current_device())
    found = kernel_speed(Bench.on(device, rounds=2, sparsities=(0.0, 0.5)), ["small"], torch.bfloat16, tokens=[1, 4])
    assert "problem" not in json.dumps(found)
    for entry in found["sites"]:
        assert all(0 < s["share_of_copy"]["median"] < 2 for s in entry["sides"])
