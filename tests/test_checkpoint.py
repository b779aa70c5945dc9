"""Saving and loading: what is written, what comes back with and without sparsify, what a kill or a full disk leaves.

Kills and limits run in forked copies of this process, which share its imports and take milliseconds.
"""

import errno
import functools
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sparsify
from sparsify import checkpoint
from sparsify.checkpoint import LEDGER, SETTINGS, read_ledger
from sparsify.config import SparsifyConfig
from sparsify.errors import CheckpointError, SparsifyError, UnavailableError
from sparsify.manifest import MANIFEST
from sparsify.runtime import sparse_layers

# The linears of tiny_dense: two layers of q, k, v, o, gate, up, down.
LINEARS = 14
TOKENS = torch.arange(32).reshape(2, 16)


def _logits(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(TOKENS).logits
    return logits


def _convert(dtype: torch.dtype, *, tied: bool = False, sparsity: float = 0.5) -> Any:
    """Returns a converted random Llama of one layer."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=tied, dtype=dtype,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    calibration = sparsify.Calibration(torch.randint(64, (2, 32)), "random tokens")
    return sparsify.convert(model, sparsify.RSparse(sparsity=sparsity, rho=0.8), calibration)


@pytest.fixture(scope="module")
def without_sparsify(tiny_sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with logits.pt and resaved/: what transformers alone makes of the sparse checkpoint."""
    out = tmp_path_factory.mktemp("without")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tiny_sparse)!r})\n"
        "with torch.inference_mode():\n"
        "    torch.save(model(torch.arange(32).reshape(2, 16)).logits, 'logits.pt')\n"
        "model.save_pretrained('resaved')\n"
        "sys.exit('sparsify' in sys.modules)\n"
    )
    environment = os.environ | {"SPARSIFY_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


class TestWhatIsWritten:
    def test_files_settings_and_ledger(self, tiny_sparse: Path) -> None:
        names = {path.name for path in tiny_sparse.iterdir()}
        assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", SETTINGS, LEDGER, MANIFEST}
        assert yaml.safe_load((tiny_sparse / SETTINGS).read_text()) == {"method": "rsparse"}
        ledger = read_ledger(tiny_sparse)
        assert len(ledger.linears) == LINEARS
        assert ledger.weighted_sparsity == pytest.approx(0.5, abs=0.02)

    def test_every_dense_tensor_is_there_unchanged(self, tiny_sparse: Path, tiny_dense: Path) -> None:
        with (
            safe_open(tiny_sparse / "model.safetensors", "pt") as sparse,
            safe_open(tiny_dense / "model.safetensors", "pt") as dense,
        ):
            assert set(dense.keys()) < set(sparse.keys())
            added = set(sparse.keys()) - set(dense.keys())
            assert {name.rpartition(".")[2] for name in added} == {"threshold", "scale", "lr_a", "lr_b"}
            assert all(torch.equal(sparse.get_tensor(name), dense.get_tensor(name)) for name in dense.keys())  # noqa: SIM118

    def test_manifest_names_every_other_file(self, tiny_sparse: Path) -> None:
        files = json.loads((tiny_sparse / MANIFEST).read_text())["files"]
        assert set(files) == {path.name for path in tiny_sparse.iterdir()} - {MANIFEST}
        assert all(entry["bytes"] == (tiny_sparse / name).stat().st_size for name, entry in files.items())
        assert sparsify.verify(tiny_sparse) == []

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
    def test_modes_follow_the_umask(self, mask: int, tmp_path: Path) -> None:
        before = os.umask(mask)
        try:
            out = sparsify.save(_convert(torch.float32), tmp_path / "out")
        finally:
            os.umask(before)
        assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask
        assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~mask}

    def test_missing_parents_are_made(self, tmp_path: Path) -> None:
        assert sparsify.verify(sparsify.save(_convert(torch.float32), tmp_path / "a" / "b")) == []


class TestWhatComesBack:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    def test_same_tensors_and_logits(self, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
        model = _convert(dtype, tied=tied)
        loaded = sparsify.load(sparsify.save(model, tmp_path / "out"))
        before, after = model.state_dict(), loaded.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert {t.dtype for name, t in after.items() if name.endswith(("threshold", "scale"))} == {torch.float32}
        assert torch.equal(_logits(loaded), _logits(model))
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert isinstance(loaded.config.quantization_config, SparsifyConfig)
        assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()

    def test_plain_from_pretrained_is_the_same_model(self, tiny_sparse: Path) -> None:
        plain = AutoModelForCausalLM.from_pretrained(tiny_sparse)
        assert len(sparse_layers(plain)) == LINEARS
        assert torch.equal(_logits(plain), _logits(sparsify.load(tiny_sparse)))

    def test_a_relative_path_upwards(self, tiny_sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        folder = os.path.relpath(tiny_sparse)
        assert folder.startswith("..")
        assert len(sparse_layers(sparsify.load(folder))) == LINEARS
        assert sparsify.verify(folder) == []

    def test_the_hub_cache_may_link_to_its_blobs(self, tiny_sparse: Path, tmp_path: Path) -> None:
        snapshot, blobs = tmp_path / "models--me--tiny" / "snapshots" / "abc", tmp_path / "models--me--tiny" / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for path in tiny_sparse.iterdir():
            (blobs / f"blob-{path.name}").write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
        assert len(sparse_layers(sparsify.load(snapshot))) == LINEARS

    def test_dense_without_sparsify(self, without_sparsify: Path, tiny_dense: Path) -> None:
        expected = _logits(sparsify.load_dense(str(tiny_dense)))
        assert torch.equal(torch.load(without_sparsify / "logits.pt"), expected)

    def test_dense_with_sparsify(self, tiny_sparse: Path, tiny_dense: Path) -> None:
        expected = _logits(sparsify.load_dense(str(tiny_dense)))
        dense = sparsify.load(tiny_sparse, dense=True)
        assert sparse_layers(dense) == {}
        assert torch.equal(_logits(dense), expected)
        sparse = sparsify.load(tiny_sparse)
        assert not torch.equal(_logits(sparse), expected)
        with sparsify.dense(sparse):
            # The sparse model's weights may lie in memory by channels, where the matrix product sums in another order.
            assert torch.allclose(_logits(sparse).float(), expected.float(), atol=0.1)

    def test_saved_again_without_sparsify_is_refused(self, without_sparsify: Path) -> None:
        for load in (sparsify.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(CheckpointError, match=r"saved again without sparsify.*delete quantization_config"):
                load(without_sparsify / "resaved")
        # The way out that the message names.
        config = json.loads((without_sparsify / "resaved" / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "sparsify"
        assert sparse_layers(sparsify.load_dense(str(without_sparsify / "resaved"))) == {}

    @pytest.mark.parametrize("shard", ["20KB", "5GB"], ids=["shards", "one-file"])
    def test_save_pretrained_again(self, shard: str, tiny_sparse: Path, tmp_path: Path) -> None:
        model: Any = sparsify.load(tiny_sparse)
        model.save_pretrained(tmp_path / "again", max_shard_size=shard)
        assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 1) == (shard == "20KB")
        again = sparsify.load(tmp_path / "again")
        assert len(sparse_layers(again)) == LINEARS
        assert torch.equal(_logits(again), _logits(model))

    def test_save_again_is_the_same_checkpoint(self, tiny_sparse: Path, tmp_path: Path) -> None:
        out = sparsify.save(sparsify.load(tiny_sparse), tmp_path / "again")
        assert (out / "model.safetensors").read_bytes() == (tiny_sparse / "model.safetensors").read_bytes()
        assert (out / LEDGER).read_bytes() == (tiny_sparse / LEDGER).read_bytes()


class TestWhatIsRefused:
    def test_an_output_that_exists_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("kept")
        (tmp_path / "link").symlink_to("nowhere")
        for name in ("out", "link"):
            with pytest.raises(SparsifyError, match="exists already"):
                sparsify.save(_convert(torch.float32), tmp_path / name)
        assert (tmp_path / "out" / "precious").read_text() == "kept"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]

    def test_an_output_that_appears_meanwhile_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def write(folder: Path) -> None:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").write_text("kept")

        monkeypatch.setattr(checkpoint, "write_manifest", write)
        with pytest.raises(SparsifyError):
            sparsify.save(_convert(torch.float32), tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]

    def test_a_dense_model(self, tiny_dense: Path, tmp_path: Path) -> None:
        model = LlamaForCausalLM.from_pretrained(tiny_dense)
        with pytest.raises(SparsifyError, match="not converted"):
            sparsify.save(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UnavailableError, match="cannot be written"):
            sparsify.save(_convert(torch.float32), tmp_path / "file" / "out")


class TestKillsAndFullDisks:
    def test_a_kill_at_any_time_leaves_no_half_checkpoint(self, tmp_path: Path) -> None:
        model = _convert(torch.float32)
        status, events = _in_child(lambda: _count_events(lambda: sparsify.save(model, tmp_path / "counted")))
        assert status == 0, events
        count = int(events)
        assert count > 30
        # Spread over the whole, and each of the last, where manifest, modes and rename are.
        points = sorted({*range(1, count, max(count // 8, 1)), *range(count - 6, count + 1)})
        for point in points:
            out = tmp_path / f"out-{point}"
            save = functools.partial(sparsify.save, model, out)
            status, said = _in_child(functools.partial(_count_events, save, point))
            assert os.WIFSIGNALED(status), said
            assert os.WTERMSIG(status) == signal.SIGKILL
            # The last event is after the rename: there, and only there, it may be whole.
            assert not out.exists() or sparsify.verify(out) == [], f"killed at event {point} of {count}"
        assert not (tmp_path / f"out-{points[0]}").exists()
        assert sparsify.verify(sparsify.save(model, tmp_path / f"out-{points[0]}")) == []

    @pytest.mark.parametrize("limit", [0, 200, 20_000], ids="{} bytes".format)
    def test_a_file_that_cannot_grow(self, limit: int, tmp_path: Path) -> None:
        model = _convert(torch.float32)

        def save() -> str:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with pytest.raises(UnavailableError, match="the disk is full"):
                sparsify.save(model, tmp_path / "out")
            return ""

        status, said = _in_child(save)
        assert status == 0, said
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "problem",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            # As the Rust writer of weights words it.
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ],
        ids=lambda problem: str(problem)[:12],
    )
    def test_a_full_disk(self, problem: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(folder: Path) -> None:
            raise problem

        monkeypatch.setattr(checkpoint, "write_manifest", fail)
        with pytest.raises(UnavailableError, match=r"the disk is full.*--out"):
            sparsify.save(_convert(torch.float32), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_an_interruption_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(folder: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sparsify.save(_convert(torch.float32), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


_EVENTS = {"open", "os.mkdir", "os.chmod", "os.rename", "os.listdir", "os.scandir", "fsync"}


def _count_events(work: Callable[[], object], kill_at: int | None = None) -> str:
    """Runs work and returns how many file operations it made; or kills this process at one of them."""
    count = 0

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _EVENTS:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def seen_fsync(handle: int) -> None:
        see("fsync", ())
        fsync(handle)

    sys.addaudithook(see)
    os.fsync = seen_fsync
    work()
    return str(count)


def _in_child(work: Callable[[], str]) -> tuple[int, str]:
    """Runs work in a forked process; returns its wait status and its text, or status 256 and a traceback."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code, text = 1, ""
        try:
            code, text = 0, work()
        except BaseException:  # noqa: BLE001
            text = traceback.format_exc()
        finally:
            os.write(writer, text.encode()[:60_000])
            os._exit(code)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        text = file.read()
    return os.waitpid(child, 0)[1], text


def test_device_that_is_not_here_is_one_clear_error(tiny_sparse: Path) -> None:
    with pytest.raises(UnavailableError, match="device 'nowhere' cannot be used"):
        sparsify.load(tiny_sparse, device="nowhere")


def test_card_names_the_source_and_no_path_of_this_machine(tiny_sparse: Path, tiny_dense: Path) -> None:
    card = (tiny_sparse / "README.md").read_text(encoding="utf-8")
    assert f"# {tiny_dense.name}, rsparse at 50%" in card
    assert str(tiny_dense.parent) not in card
