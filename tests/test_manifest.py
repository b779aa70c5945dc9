"""What verify says of one change in a sound checkpoint, and that files are on the disk before they have their names."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sparsify
from sparsify.checkpoint import LEDGER, SETTINGS
from sparsify.cli.main import build_app
from sparsify.header import read_header
from sparsify.manifest import CARD, MANIFEST, checkpoint_sha256, replace_card, write_manifest
from sparsify.whole_file import write_whole

Q = "model.layers.0.self_attn.q_proj"
SHARD = "model.safetensors"
CHANGED = f"{SHARD}: its content was changed (SHA-256 differs)"


@pytest.fixture
def folder(tiny_sparse: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sparse, tmp_path / "checkpoint"))


def _change_json(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2))


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", f"{Q}.weight", f"{Q}.threshold", f"{Q}.scale",
     f"{Q}.lr_a", f"{Q}.lr_b"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["first bit", "last bit"])
def test_a_flipped_bit(name: str, place: str, folder: Path) -> None:
    tensor = read_header(folder / SHARD)[name]
    data = bytearray((folder / SHARD).read_bytes())
    data[tensor.begin if place == "first bit" else tensor.end - 1] ^= 1 if place == "first bit" else 0x80
    (folder / SHARD).write_bytes(data)
    problems = sparsify.verify(folder)
    assert problems[:2] == [CHANGED, f"{SHARD}: the tensor {name!r} was changed (CRC-32 differs)"]
    # The sign of a threshold or a scale is also wrong by itself.
    assert len(problems) == 2 or name.rpartition(".")[0] == Q


def test_tensors_missing_and_extra(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors["evil"] = tensors.pop(f"{Q}.lr_a").clone()
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    written, missing, added, refused = sparsify.verify(folder)
    assert written.startswith(f"{SHARD}: ")
    assert "bytes" in written
    assert missing == f"{SHARD}: the tensor '{Q}.lr_a' is missing"
    assert added == f"{SHARD}: the tensor 'evil' was added"
    assert "has no 'model.layers.0.self_attn.q_proj.lr_a'" in refused


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c.update(rope_theta=7.0), "rope_theta was added: 7.0"),
        (lambda c: c.update(rms_norm_eps=0.5), "rms_norm_eps is 0.5, it should be 1e-06"),
        (lambda c: c.pop("vocab_size"), "vocab_size is missing, it should be 258"),
        (lambda c: c["architectures"].append("x"), "architectures is ['LlamaForCausalLM', 'x'], it should be ['Llama"),
        (lambda c: c.update(tie_word_embeddings=0), "tie_word_embeddings is 0, it should be False"),
        (
            lambda c: c["quantization_config"]["linears"][Q].update(density=0.25),
            f"quantization_config.linears.{Q}.density is 0.25, it should be ",
        ),
        (
            lambda c: c["quantization_config"].update(prefill="dense"),
            "quantization_config.prefill is 'dense', it should be 'sparse'",
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_value_of_the_config(change: Callable[[Any], object], line: str, folder: Path) -> None:
    _change_json(folder / "config.json", change)
    problems = sparsify.verify(folder)
    assert any(problem.startswith(f"config.json: {line}") for problem in problems), problems
    # Only that one key is blamed.
    assert sum(" should be " in p or " was added" in p for p in problems if p.startswith("config.json")) == 1


def test_a_config_that_is_written_in_another_way(folder: Path) -> None:
    _change_json(folder / "config.json", lambda config: None)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n\n")
    (problem,) = sparsify.verify(folder)
    assert problem.startswith("config.json: ")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda d: d["linears"][3].update(outputs=65), "linears[3].outputs is 65, it should be 64"),
        (lambda d: d["linears"][0].update(density=0.125), "linears[0].density is 0.125, it should be "),
        (lambda d: d.update(weighted_sparsity=0.99), "weighted_sparsity is 0.99, it should be 0."),
        (lambda d: d.update(rest_bytes_per_token=1), "rest_bytes_per_token is 1, it should be "),
        (lambda d: d["linears"].pop(), "linears is ["),
        (lambda d: d.update(extra=1), "the ledger: unknown key 'extra'"),
        (lambda d: d["linears"].clear(), "it names no linears"),
        (lambda d: d["linears"][0].update(density=float("nan")), "density is nan, it must be in [0, 1]"),
        (lambda d: d["linears"][0].update(inputs=0), "inputs is 0, it must be in [1, "),
    ],
    ids=range(9),
)
def test_a_ledger_that_is_not_the_models(change: Callable[[Any], object], line: str, folder: Path) -> None:
    """Found even where the manifest was written anew for it."""
    _change_json(folder / LEDGER, change)
    assert any(problem.startswith(f"{LEDGER}: ") for problem in sparsify.verify(folder))
    write_manifest(folder)
    problems = sparsify.verify(folder)
    assert any(line in problem for problem in problems), problems


def test_extra_and_missing_files(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "evil.py").write_text("")
    (folder / ".hidden").write_text("")
    (folder / SETTINGS).unlink()
    assert sparsify.verify(folder) == [
        f"{SETTINGS}: missing", ".hidden: not in the manifest", "more/evil.py: not in the manifest"
    ]  # fmt: skip


def test_a_manifest_without_tensors_and_config_is_read(folder: Path) -> None:
    """As sparsify wrote them before it could say which tensor was changed."""
    _change_json(folder / MANIFEST, lambda manifest: (manifest.pop("tensors"), manifest.pop("config")))
    assert sparsify.verify(folder) == []
    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 1
    (folder / SHARD).write_bytes(data)
    assert sparsify.verify(folder)[0] == CHANGED


def test_the_command_names_the_checkpoint_and_each_problem(folder: Path) -> None:
    sound = CliRunner().invoke(build_app(), ["verify", str(folder)])
    assert sound.exit_code == 0
    assert str(checkpoint_sha256(folder)) in sound.stdout
    (folder / "extra\x1b[31m").write_text("")
    _change_json(folder / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    result = CliRunner().invoke(build_app(), ["verify", str(folder)])
    assert result.exit_code == 1
    assert "rms_norm_eps is 0.5, it should be 1e-06" in result.stdout
    assert "extra\\x1b[31m: not in the manifest" in result.stdout


class TestOnTheDisk:
    @pytest.fixture
    def events(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
        """What is synced and renamed, in order."""
        seen: list[tuple[str, str]] = []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def record_sync(handle: int) -> None:
            seen.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
            fsync(handle)

        def record_move(move: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
            def moved(source: Any, target: Any) -> None:
                seen.append(("move", str(target)))
                move(source, target)

            return moved

        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(os, "rename", record_move(rename))
        monkeypatch.setattr(os, "replace", record_move(replace))
        return seen

    def test_a_checkpoint(self, tiny_sparse: Path, tmp_path: Path, events: list[tuple[str, str]]) -> None:
        out = sparsify.save(sparsify.load(tiny_sparse), tmp_path / "out", sparsify.load_tokenizer(str(tiny_sparse)))
        moved = events.index(("move", str(out)))
        before = {Path(path).name for kind, path in events[:moved] if kind == "sync"}
        assert {path.name for path in out.iterdir()} < before
        assert any(name.startswith(".out.") for name in before), "the folder itself"
        assert ("sync", str(tmp_path)) in events[moved:]

    def test_a_card(self, folder: Path, events: list[tuple[str, str]]) -> None:
        replace_card(folder, "new")
        moves = [index for index, event in enumerate(events) if event[0] == "move"]
        assert [events[index][1] for index in moves] == [str(folder / CARD), str(folder / MANIFEST)]
        assert {path for _, path in events[: moves[0]]} == {f"{folder}/.{name}.partial" for name in (CARD, MANIFEST)}
        assert events[-1] == ("sync", str(folder))

    def test_a_whole_file(self, tmp_path: Path, events: list[tuple[str, str]]) -> None:
        write_whole(tmp_path / "a.json", "{}")
        assert [kind for kind, _ in events] == ["sync", "move", "sync"]
        assert events[1:] == [("move", str(tmp_path / "a.json")), ("sync", str(tmp_path))]

    @pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
    def test_a_card_follows_the_umask(self, mask: int, folder: Path) -> None:
        before = os.umask(mask)
        try:
            replace_card(folder, "new")
        finally:
            os.umask(before)
        assert {(folder / name).stat().st_mode & 0o777 for name in (CARD, MANIFEST)} == {0o666 & ~mask}


def test_every_tensor_has_a_checksum_of_its_own(folder: Path) -> None:
    """Two tensors of the same bytes and another shape are told apart."""
    one = torch.zeros(4)
    save_file({"a": one, "b": one.reshape(2, 2).clone(), "c": one.clone()}, folder / "more.safetensors")
    write_manifest(folder)
    found = json.loads((folder / MANIFEST).read_text())["tensors"]["more.safetensors"]
    assert found["a"] == found["c"] != found["b"]
