"""Checkpoints that are damaged, forged or foreign: each is one clear error, before a weight is used.

Every case changes one thing in a copy of a sound checkpoint. Both ways in are tried: sparsify.load, and a plain
from_pretrained with the plugin registered, which may also refuse in transformers' own words.
"""

import json
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsify
from sparsify.checkpoint import LEDGER
from sparsify.cli.main import build_app
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.header import read_header
from sparsify.manifest import MANIFEST
from sparsify.preflight import INDEX

Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"
SHARD = "model.safetensors"

Change = Callable[[Path], None]


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Returns a change of the tensors, in a file that is otherwise well made."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD, metadata={"format": "pt"})

    return apply


def _put(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return _tensors(lambda tensors: tensors.update({name: value(tensors[name]).contiguous()}))


def _first(number: float) -> Callable[[Tensor], Tensor]:
    """Returns what replaces the first element of a tensor by a number."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = number
        return tensor

    return change


def _config(change: Callable[[dict[str, Any]], object]) -> Change:
    """Returns a change of the quantization_config."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def _set(*path: str, to: Any) -> Change:
    """Returns a change of one value in the quantization_config."""

    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = to

    return _config(change)


def _rename_linear(new: str) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["linears"][new] = config["linears"].pop(Q)
        config["sites"] = [[new if name == Q else name for name in names] for names in config["sites"]]

    return _config(change)


def _index(shard: str, *, move_to: str | None = None) -> Change:
    """Returns a change to an indexed checkpoint whose one shard is called `shard` and lies in move_to or nowhere."""

    def apply(folder: Path) -> None:
        names = list(load_file(folder / SHARD))
        target = folder.parent / "elsewhere" / SHARD if move_to is None else folder / move_to
        target.parent.mkdir(exist_ok=True)
        (folder / SHARD).rename(target)
        weight_map = dict.fromkeys(names, shard.format(parent=folder.parent))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return apply


def _link_out(folder: Path) -> None:
    shutil.move(folder / SHARD, folder.parent / "outside.safetensors")
    (folder / SHARD).symlink_to(folder.parent / "outside.safetensors")


def _link_to_zero(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("/dev/zero")


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def _only_pickle(folder: Path) -> None:
    (folder / SHARD).unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(_Trap(folder / "ran"), file)


class _Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


TENSORS: dict[str, tuple[Change, str]] = {
    "threshold is missing": (_tensors(lambda t: t.pop(f"{Q}.threshold")), "no '.*q_proj.threshold'.*without sparsify"),
    "factor is missing": (_tensors(lambda t: t.pop(f"{Q}.lr_b")), "no '.*q_proj.lr_b'"),
    "dense weight of a linear is missing": (_tensors(lambda t: t.pop(f"{Q}.weight")), "no '.*q_proj.weight'"),
    "norm is missing": (_tensors(lambda t: t.pop(NORM)), "no 'model.norm.weight'"),
    "embedding is missing": (_tensors(lambda t: t.pop("model.embed_tokens.weight")), "no 'model.embed_tokens.weight'"),
    "norm has another name": (
        _tensors(lambda t: t.update({"model.nrom.weight": t.pop(NORM)})),
        "no 'model.norm.weight'",
    ),
    "added tensor too many": (
        _tensors(lambda t: t.update({"lm_head.threshold": torch.zeros(())})),
        "'lm_head.threshold', which its quantization_config does not name",
    ),
    "weight of another shape": (_put(f"{Q}.weight", lambda t: t[:-1]), r"q_proj.weight has the shape \[63, 64\]"),
    "norm of another shape": (_put(NORM, lambda t: t[:-1]), "norm.weight has the shape"),
    "factor of another rank": (_put(f"{Q}.lr_a", lambda t: t[:-1]), "q_proj.lr_a has the shape"),
    "threshold of one per channel": (_put(f"{Q}.threshold", lambda t: t.expand(64)), "q_proj.threshold has the shape"),
    "threshold in bf16": (_put(f"{Q}.threshold", lambda t: t.bfloat16()), "threshold is stored as BF16, F32"),
    "scale in int32": (_put(f"{Q}.scale", lambda t: t.int()), "scale is stored as I32, F32"),
    "factor in int8": (_put(f"{Q}.lr_a", lambda t: t.to(torch.int8)), "q_proj.lr_a"),
    "threshold is NaN": (_put(f"{Q}.threshold", _first(float("nan"))), "threshold holds values that are not finite"),
    "threshold is infinite": (
        _put(f"{Q}.threshold", _first(float("inf"))),
        "threshold holds values that are not finite",
    ),
    "scale is NaN": (_put(f"{Q}.scale", _first(float("nan"))), "scale holds values that are not finite"),
    "scale is negative": (_put(f"{Q}.scale", _first(-0.5)), "negative scales"),
    "lr_a has a NaN": (_put(f"{Q}.lr_a", _first(float("nan"))), "lr_a holds values that are not finite"),
    "lr_b has an infinity": (_put(f"{Q}.lr_b", _first(float("-inf"))), "lr_b holds values that are not finite"),
}

FILES: dict[str, tuple[Change, str]] = {
    "no weights": (lambda folder: (folder / SHARD).unlink(), "neither model.safetensors nor"),
    "truncated by a byte": (_bytes(SHARD, lambda data: data[:-1]), "not a readable safetensors file"),
    "truncated in the header": (_bytes(SHARD, lambda data: data[:100]), "not a readable safetensors file"),
    "empty": (_bytes(SHARD, lambda data: b""), "not a readable safetensors file"),
    "garbage": (_bytes(SHARD, lambda data: b"\xff" * 4096), "not a readable safetensors file"),
    "header of 2^62 bytes": (
        _bytes(SHARD, lambda data: struct.pack("<Q", 1 << 62) + data[8:]),
        "not a readable safetensors file",
    ),
    "header of 90 MB that is not there": (
        _bytes(SHARD, lambda data: struct.pack("<Q", 90_000_000) + data[8:]),
        "not a readable safetensors file",
    ),
    "tensor of 2^60 bytes": (
        lambda folder: (folder / SHARD).write_bytes(_header({NORM: _entry([1 << 40, 1 << 20], 0, 1 << 60)})) and None,
        "not a readable safetensors file",
    ),
    "pickled weights only": (_only_pickle, "neither model.safetensors nor"),
    "index upwards": (_index("../elsewhere/model.safetensors"), "not a file name inside its folder"),
    "index to an absolute path": (_index("{parent}/elsewhere/model.safetensors"), "not a file name inside its folder"),
    "index to a shard that is missing": (_index("model-00001-of-00001.safetensors"), "which is missing"),
    "index to a pickle": (_index("weights.bin", move_to="weights.bin"), "not a safetensors file"),
    "link out of the folder": (_link_out, "outside of its folder"),
    "link to a device": (_link_to_zero, "a link to /dev/zero, which is outside of its folder"),
    "config.json is missing": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config.json is empty": (_bytes("config.json", lambda data: b""), "config.json cannot be read"),
    "config.json is not JSON": (_bytes("config.json", lambda data: data[:-20]), "config.json cannot be read"),
    "config.json is not UTF-8": (_bytes("config.json", lambda data: b"\xff\xfe" + data), "config.json cannot be read"),
    "config.json is a list": (_bytes("config.json", lambda data: b"[1, 2]"), "config.json cannot be read"),
    "config.json is nested deeply": (
        _bytes("config.json", lambda data: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "config.json cannot be read",
    ),
}

LINEAR = ("linears", Q)
CONFIG: dict[str, tuple[Change, str]] = {
    "foreign method": (_set("quant_method", to="sparsifier"), "not a sparsify checkpoint"),
    "schema of the future": (_set("schema_version", to=2), "schema_version is 2, this sparsify reads 1"),
    "schema is a truth": (_set("schema_version", to=True), "schema_version"),
    "schema is missing": (_config(lambda c: c.pop("schema_version")), "schema_version is None"),
    "unknown key": (_set("threshold_mode", to="exact"), "unknown key 'threshold_mode'"),
    "missing key": (_config(lambda c: c.pop("linears")), "the key 'linears' is missing"),
    "unknown key of a linear": (_set(*LINEAR, "ranc", to=1), "unknown key 'ranc'.*Did you mean 'rank'"),
    "missing key of a linear": (_config(lambda c: c["linears"][Q].pop("rank")), "the key 'rank' is missing"),
    "sparsity is a text": (_set(*LINEAR, "sparsity", to="0.5"), "sparsity"),
    "rank is a number with a point": (_set(*LINEAR, "rank", to=4.0), "rank"),
    "rank is a truth": (_set(*LINEAR, "rank", to=True), "rank is True"),
    "scaled is a number": (_set(*LINEAR, "scaled", to=1), "scaled"),
    "linear is a list": (_set(*LINEAR, to=[0.5]), "expected a mapping"),
    "linears is a list": (_set("linears", to=[]), "linears"),
    "sites is a dict": (_set("sites", to={}), "sites"),
    "sites hold numbers": (_config(lambda c: c["sites"].append([1])), "sites"),
    "calibration is null": (_set("calibration", to=None), "calibration"),
    "method_config without sparsity": (_set("method_config", to={}), "sparsity"),
    "sparsity is beyond 1": (_set("method_config", "sparsity", to=1.5), "sparsity"),
    "sparsity is NaN": (_set("method_config", "sparsity", to=float("nan")), "sparsity"),
    "density is NaN": (_set(*LINEAR, "density", to=float("nan")), "density is nan"),
    "rho is negative": (_set(*LINEAR, "rho", to=-0.1), "rho is -0.1"),
    "error is infinite": (_set(*LINEAR, "error", to=float("inf")), "error is inf"),
    "prefill is unknown": (_set("prefill", to="lazy"), "prefill is 'lazy'"),
    "rank is negative": (_set(*LINEAR, "rank", to=-1), "rank is -1"),
    "rank is larger than the linear": (_set(*LINEAR, "rank", to=65), "the rank 65"),
    "rank is enormous": (_set(*LINEAR, "rank", to=1 << 62), "the rank"),
    "rank is not the factors'": (_set(*LINEAR, "rank", to=2), "q_proj.lr_a has the shape"),
    "unscaled though it has scales": (_set(*LINEAR, "scaled", to=False), "q_proj.scale'"),
    "linear that does not exist": (_rename_linear("model.layers.9.self_attn.q_proj"), "has nothing"),
    "linear that is a norm": (_rename_linear("model.norm"), "has a LlamaRMSNorm"),
    "linear that is the model": (_rename_linear("model"), "has a LlamaModel"),
    "linear without a name": (_rename_linear(""), "has a LlamaForCausalLM"),
    "sites and linears disagree": (_config(lambda c: c["sites"].pop()), "do not name the same linears"),
}
# What transformers loads as the dense model or refuses in its own way, before the plugin is asked.
NOT_OURS = {"foreign method"}


def _entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}


def _header(tensors: dict[str, Any]) -> bytes:
    data = json.dumps(tensors).encode()
    return struct.pack("<Q", len(data)) + data


@pytest.fixture
def folder(tiny_sparse: Path, tmp_path: Path) -> Path:
    """A copy of the sound checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_sparse, tmp_path / "checkpoint"))


def _refuses(folder: Path, message: str, *, plain: bool) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        sparsify.load(folder)
    assert "\n" not in str(refusal.value)
    if plain:
        with pytest.raises((SparsifyError, OSError, ValueError, TypeError, RuntimeError)):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, folder: Path) -> None:
    change, message = TENSORS[case]
    change(folder)
    _refuses(folder, message, plain=True)
    problems = sparsify.verify(folder)
    assert any("SHA-256 differs" in problem or "bytes" in problem for problem in problems)


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, folder: Path) -> None:
    change, message = FILES[case]
    change(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _refuses(folder, message, plain=False)
    # In KiB: what a header claims is never allocated.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "case", ["index upwards", "index to an absolute path", "link out of the folder", "garbage", "index to a pickle"]
)
def test_files_through_plain_from_pretrained(case: str, folder: Path) -> None:
    FILES[case][0](folder)
    with pytest.raises(CheckpointError, match=r"outside of its folder|not a (readable )?safetensors file"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("case", CONFIG)
def test_configuration(case: str, folder: Path) -> None:
    change, message = CONFIG[case]
    change(folder)
    _refuses(folder, message, plain=case not in NOT_OURS)


def test_a_path_upwards_is_refused_for_dense_models_too(tiny_dense: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dense, tmp_path / "model"))
    FILES["index upwards"][0](folder)
    with pytest.raises(CheckpointError, match="not a file name inside its folder"):
        sparsify.load_dense(str(folder))


def test_a_dense_model_without_a_weight_is_refused(tiny_dense: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dense, tmp_path / "model"))
    TENSORS["norm is missing"][0](folder)
    with pytest.raises(CheckpointError, match=r"no weight 'model\.norm\.weight'"):
        sparsify.load_dense(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "big"), ("num_attention_heads", 0), ("model_type", "nonesuch"), ("num_hidden_layers", -1)],
)
def test_a_config_that_is_not_the_models(key: str, value: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(SparsifyError) as refusal:
        sparsify.load(folder)
    assert "\n" not in str(refusal.value)
    assert sparsify.verify(folder) != []


class TestVerify:
    def test_bit_flip_in_a_dense_weight(self, folder: Path) -> None:
        _bytes(SHARD, lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])(folder)
        names = [name for name, tensor in read_header(folder / SHARD).items()]
        assert sparsify.verify(folder) == [
            f"{SHARD}: its content was changed (SHA-256 differs)",
            f"{SHARD}: the tensor {names[-1]!r} was changed (CRC-32 differs)",
        ]

    def test_files_too_many_and_too_few(self, folder: Path) -> None:
        (folder / "README.md").unlink()
        (folder / "extra.py").write_text("")
        assert sparsify.verify(folder) == ["README.md: missing", "extra.py: not in the manifest"]

    def test_a_manifest_that_lies(self, folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][SHARD]["sha256"] = "0" * 64
        manifest["files"]["README.md"]["bytes"] += 1
        (folder / MANIFEST).write_text(json.dumps(manifest))
        problems = sparsify.verify(folder)
        assert [problem.partition(":")[0] for problem in problems] == ["README.md", SHARD, SHARD]
        assert problems[-1] == f"{SHARD}: none of its tensors was changed"

    @pytest.mark.parametrize(
        "content",
        [b"", b"[]", b'{"version": 1}', b'{"version": 1, "files": {"a": 1}}', b'{"version": 2, "files": {}}', b"\xff"],
    )
    def test_a_manifest_that_is_none(self, content: bytes, folder: Path) -> None:
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(CheckpointError, match=MANIFEST):
            sparsify.verify(folder)

    def test_no_manifest(self, folder: Path) -> None:
        (folder / MANIFEST).unlink()
        with pytest.raises(CheckpointError, match=f"no {MANIFEST}"):
            sparsify.verify(folder)

    @pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b'{"linears": 3}', b"\xff"])
    def test_a_ledger_that_is_none(self, content: bytes, folder: Path) -> None:
        (folder / LEDGER).write_bytes(content)
        assert any("ledger" in problem for problem in sparsify.verify(folder)[1:])


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize(
    "case",
    ["config.json is not JSON", "config.json is nested deeply", "rank is a truth", "garbage"],
)
def test_the_command_line_says_one_line(command: str, case: str, folder: Path) -> None:
    (FILES | CONFIG)[case][0](folder)
    result = CliRunner().invoke(build_app(), [command, str(folder)])
    assert result.exit_code in (1, 3), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
