"""Launches and bytes of a token, counted on meta tensors, against sums by hand."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals.gpu_cost import gpu_cost, main, table
from sparsify.kernels import triton_backend

# Bytes of the linears of all blocks, in bf16, by hand from the published shapes.
_LINEARS = {
    "llama-2-7b": 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008),
    "llama-3-8b": 2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
}
_HEADS = {"llama-2-7b": 32000, "llama-3-8b": 128256}
_KEYS = {"llama-2-7b": 4096, "llama-3-8b": 1024}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("shape", ["llama-2-7b", "llama-3-8b"])
def test_a_token_of_a_real_shape(shape: str, sparsity: float) -> None:
    cost = gpu_cost(shape, sparsity, context=1023)
    assert cost.weights == pytest.approx(_LINEARS[shape] * (1 - sparsity))
    assert cost.rest == 2 * 4096 * (_HEADS[shape] + 2 * 32 + 1 + 1)
    assert cost.cache == 2 * 2 * 32 * _KEYS[shape] * 1024
    # Seven launches a block; the last norm; torch looks the embedding up, multiplies by the head and chooses.
    assert cost.launches == {"add_norm": 2 * 32 + 1, "sparse_gemv": 4 * 32, "decode_attention": 32}
    assert cost.torch_operators == {"embedding": 1, "linear": 1, "argmax": 1}
    # Partial sums stay small beside the weights: they are 4 bytes for each 2 that a part reads of a column.
    assert 0 < cost.partial < 0.02 * _LINEARS[shape]
    assert not cost.indexed


def test_lists_need_launches_of_their_own() -> None:
    cost = gpu_cost("llama-3-8b", 0.9)
    assert cost.indexed
    assert cost.launches == {"add_norm": 65, "sparse_gemv": 128, "decode_attention": 32, "select": 2 * 32}
    assert gpu_cost("llama-3-8b", 0.9, batch=4).launches["select"] == 4 * 32


def test_what_cannot_be_counted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsifyError, match=r"the sparsity is 1\.0, it must be in \[0, 1\)"):
        gpu_cost("llama-3-8b", 1.0)
    with pytest.raises(SparsifyError, match="unknown shape 'llama-4'"):
        gpu_cost("llama-4", 0.5)
    monkeypatch.setattr(triton_backend, "is_installed", lambda: False)
    with pytest.raises(UnavailableError, match="Triton is not installed"):
        gpu_cost("llama-3-8b", 0.5)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cost.json"
    assert main(["--shape", "llama-3-8b", "--sparsity", "0", "--sparsity", "0.5", "--save", str(file)]) == 0
    dense, half = json.loads(file.read_text())
    assert dense["moved"] == dense["weights"] + dense["rest"] + dense["cache"]
    assert half["all_launches"] == 32 * 7 + 1 + 3
    out = capsys.readouterr().out
    assert "| llama-3-8b | 50% | masks | 225 | 3 | 6.98 GB |" in out
    assert f"{dense['moved'] / half['moved']:.2f}" in out
    assert main(["--shape", "llama-4"]) == 2
    assert "error: unknown shape" in capsys.readouterr().err
    assert table([], 1000.0).count("\n") == 1


def test_counting_takes_no_memory() -> None:
    gpu_cost("llama-2-7b", 0.5)
    assert not torch.cuda.is_initialized()
