"""The crossover table of a tiny model: every cell is there, its inputs are the model's and its arithmetic is right."""

import json

import pytest
import torch
from transformers import PreTrainedModel

from sparsify.calibration import Calibration
from sparsify.conversion import convert
from sparsify.errors import UnavailableError
from sparsify.evals import crossover as crossover_module
from sparsify.evals.cold_calls import Cold, Copies, cold_turns, torch_calls
from sparsify.evals.crossover import crossover
from sparsify.evals.interleaving import Spread
from sparsify.evals.stream import Stream
from sparsify.kernels import library
from sparsify.methods.teal import Teal

pytestmark = [
    pytest.mark.usefixtures("small_stream"),
    pytest.mark.skipif(library.missing() is not None, reason=str(library.missing())),
]


@pytest.mark.parametrize("converted", [False, True])
def test_every_cell_is_measured(converted: bool, tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    if converted:
        convert(tiny_llama, Teal(sparsity=0.5), tiny_calibration)
    seen: list[tuple[int, int]] = []
    result = crossover(
        tiny_llama, tiny_calibration.tokens, batches=(1, 8), sparsities=(0.0, 0.5, 0.9), rounds=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 2), (2, 2)]
    # gate, up and down are as large; the first kind, of the middle block.
    assert (result.linear, result.outputs, result.inputs) == ("model.layers.1.mlp.gate_proj", 96, 64)
    assert [(cell.batch, cell.sparsity) for cell in result.cells] == [(b, s) for b in (1, 8) for s in (0.0, 0.5, 0.9)]
    kept = {(cell.batch, cell.sparsity): cell.kept for cell in result.cells}
    assert kept[1, 0.0] == kept[8, 0.0] == 1.0
    assert kept[1, 0.5] == pytest.approx(0.5, abs=0.15)
    assert kept[1, 0.9] < kept[8, 0.9] < kept[8, 0.5]
    data = json.loads(json.dumps(result.to_dict()))
    assert set(data) >= {"cells", "stream_gb_per_second", "cpu", "isa", "threads", "dtype", "rounds"}
    assert set(data["cells"][0]) == {
        "batch", "sparsity", "kept", "sparse_ms", "dense_ms", "dense", "ratio", "faster"
    }  # fmt: skip


def test_the_best_dense_product_is_what_sparse_is_held_against() -> None:
    seconds = {
        "torch": [[4.0], [4.0], [4.0]],
        "torch, oneDNN off": [[2.0], [2.0], [2.0]],
        "our kernel": [[3.0], [3.0], [3.0]],
        "0.0": [[4.0], [4.0], [4.0]],
        "0.5": [[2.0], [1.0], [4.0]],
        "0.9": [[0.5], [0.5], [1.0]],
    }
    cells = crossover_module._cells(Cold(seconds, [1.0], None), 2, {0.0: 1.0, 0.5: 0.7, 0.9: 0.2})
    assert {cell.dense for cell in cells} == {"torch, oneDNN off"}
    assert [cell.faster for cell in cells] == ["dense", "neither", "sparse"]
    assert cells[1].ratio == Spread(1.0, 0.5, 2.0)
    assert cells[2].ratio == Spread(4.0, 2.0, 4.0)
    assert cells[2].sparse_ms.median == 500.0


def test_without_the_native_kernels(tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing", lambda: "not built: do this")
    with pytest.raises(UnavailableError, match="do this"):
        crossover(tiny_llama, torch.zeros(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("layout", ["rows", "channels"])
def test_copies_are_equal_and_separate(layout: str) -> None:
    weight = torch.randn(6, 4).t().contiguous().t() if layout == "channels" else torch.randn(6, 4)
    copies = Copies.of(weight)
    assert len(copies.rows) == len(copies.channels) == 2
    tensors = [*copies.rows, *copies.channels]
    assert all(torch.equal(tensor, weight) for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in [*tensors, weight]}) == 5
    assert all(tensor.is_contiguous() for tensor in copies.rows)
    assert all(tensor.t().is_contiguous() for tensor in copies.channels)


def test_every_copy_is_used_once_a_turn_and_the_cache_is_emptied_before(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    stream = Stream(torch.device("cpu"))
    monkeypatch.setattr(stream, "seconds", lambda: happened.append("read") or 0.5)
    calls = {name: lambda index, name=name: happened.append(f"{name}{index}") for name in "ab"}
    found = cold_turns(calls, 2, stream, 2)
    one, two = ["read", "a0", "a1"], ["read", "b0", "b1"]
    # The first round is not measured.
    assert happened == [*one, *two, *one, *two, *two, *one]
    assert [len(rounds) for rounds in found.seconds.values()] == [2, 2]
    assert found.stream == [stream.size / 0.5 / 1e9] * 2


def test_torch_with_and_without_onednn_are_the_same_product() -> None:
    x, weight = [torch.randn(2, 5)], [torch.randn(3, 5)]
    before = torch.backends.mkldnn.enabled
    products = [call(0) for call in torch_calls(x, weight).values()]
    assert torch.backends.mkldnn.enabled == before
    torch.testing.assert_close(*products)
