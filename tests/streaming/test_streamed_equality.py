"""A streamed conversion writes the files of the conversion in memory, byte by byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sparsify
from sparsify import weight_files
from sparsify.errors import SparsifyError
from sparsify.header import read_header
from sparsify.tensor_file import stored_entry, tensor_entry, write_tensors
from tests.streaming.conftest import Setting, contents, random_llama, random_tokens

METHODS = {
    "teal": (sparsify.Teal(sparsity=0.5), None),
    "teal-compensated": (sparsify.Teal(sparsity=0.5, compensate=True), None),
    "teal-greedy": (sparsify.Teal(sparsity=0.5), "greedy"),
    "wina": (sparsify.Wina(sparsity=0.5), None),
    "topk": (sparsify.TopK(sparsity=0.5), None),
    "statistical-topk": (sparsify.StatisticalTopK(sparsity=0.5), None),
    "rsparse": (sparsify.RSparse(sparsity=0.5, score="auto"), None),
    "larosa": (sparsify.Larosa(sparsity=0.1, rotation="layer"), None),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_streams(setting: Setting, name: str, tmp_path: Path) -> None:
    method, allocation = METHODS[name]
    chosen = Setting(setting.model, method, setting.calibration)
    chosen.stream(tmp_path / "streamed" / "out", allocation=allocation)
    whole = contents(chosen.in_memory(tmp_path / "whole" / "out", allocation))
    assert contents(tmp_path / "streamed") == {f"out/{name}": data for name, data in whole.items()}


def test_large_models_are_a_file_for_each_block(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "SINGLE_FILE_BYTES", 1000)
    setting.stream(tmp_path / "streamed")
    assert contents(tmp_path / "streamed") == contents(setting.in_memory(tmp_path / "whole"))
    shards = sorted(path.name for path in (tmp_path / "streamed").glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert all(".layers.1." in name for name in read_header(tmp_path / "streamed" / shards[2]))
    assert sparsify.verify(tmp_path / "streamed") == []
    monkeypatch.undo()
    setting.stream(tmp_path / "single")
    loaded, single = (sparsify.load(tmp_path / name).state_dict() for name in ("streamed", "single"))
    assert all(torch.equal(loaded[name], single[name]) for name in single)


def test_verify_names_what_was_changed_in_a_shard(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "SINGLE_FILE_BYTES", 1000)
    setting.stream(tmp_path / "out")
    shard = tmp_path / "out" / "model-00003-of-00004.safetensors"
    stored = read_header(shard)["model.layers.1.mlp.up_proj.weight"]
    data = bytearray(shard.read_bytes())
    data[stored.begin + 5] ^= 1
    shard.write_bytes(data)
    assert any("'model.layers.1.mlp.up_proj.weight' was changed" in line for line in sparsify.verify(tmp_path / "out"))
    shard.unlink()
    assert any(f"{shard.name}: missing" in line for line in sparsify.verify(tmp_path / "out"))


def test_a_cast_is_the_loader_s(tmp_path: Path) -> None:
    setting = Setting(random_llama(tmp_path / "m", blocks=1, dtype=torch.float32), sparsify.Teal(0.5), random_tokens())
    setting.stream(tmp_path / "streamed", dtype="bfloat16")
    model = sparsify.load_dense(str(setting.model), dtype="bfloat16")
    sparsify.save(sparsify.convert(model, setting.method, setting.calibration), tmp_path / "whole")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


def test_what_needs_the_whole_model_is_refused(setting: Setting, tmp_path: Path) -> None:
    for method, allocation, word in (
        (sparsify.Auto(sparsity=0.5), None, "rotates"),
        (sparsify.Larosa(sparsity=0.5), None, "rotates"),
        (sparsify.Cats(sparsity=0.2), None, "neurons"),
        (sparsify.Teal(sparsity=0.5), "sensitivity", "sensitivity"),
        (sparsify.RSparse(sparsity=0.5), "evolutionary", "evolutionary"),
    ):
        with pytest.raises(SparsifyError, match=f"{word}.*use method rsparse, teal"):
            Setting(setting.model, method, setting.calibration).stream(tmp_path / "out", allocation=allocation)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_file_is_what_the_library_writes(tmp_path: Path) -> None:
    dtypes = (
        torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.uint16,
        torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64,
        torch.float64, torch.complex64,
    )  # fmt: skip
    tensors: dict[str, Any] = {f"t.{i % 3}.{i}": torch.arange(6).reshape(2, 3).to(d) for i, d in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "é": torch.ones(3, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    tensors["t.0.12"] = tensors["t.0.12"].t().contiguous().t()
    write_tensors(tmp_path / "ours", {name: tensor_entry(tensor) for name, tensor in tensors.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    del tensors["é"]
    write_tensors(tmp_path / "ours", {name: tensor_entry(tensor) for name, tensor in tensors.items()})
    copied = {name: stored_entry(stored) for name, stored in read_header(tmp_path / "ours").items()}
    record = write_tensors(tmp_path / "again", copied)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "ours").read_bytes()
    assert record.bytes == (tmp_path / "ours").stat().st_size


def test_the_index_names_every_tensor(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "SINGLE_FILE_BYTES", 1000)
    setting.stream(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in (tmp_path / "out").glob("*.safetensors") for name in read_header(path)}
    assert index["weight_map"] == held
