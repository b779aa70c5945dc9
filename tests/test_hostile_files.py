"""A corpus of checkpoints made to do harm: each is refused with one clear error, before large memory is used.

Every case makes one change to a copy of a sound checkpoint, and runs in a forked copy of this process whose memory is
measured: sparsify.load, a plain from_pretrained with the plugin registered, `sparsify verify` and `sparsify eval`.
The plain way reads config.json and the index by transformers' own code first: what that refuses is its own error.
"""

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsify
from sparsify.checkpoint import LEDGER, SETTINGS
from sparsify.cli.main import build_app
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.manifest import MANIFEST
from sparsify.preflight import INDEX

Q = "model.layers.0.self_attn.q_proj"
SHARD = "model.safetensors"
CONFIG = "config.json"
RAN = "ran"
# What refusing may take; a load of the sound checkpoint itself takes 30 MB, most of it code.
MOST_GROWTH = 64 << 20
SECONDS = 60

Change = Callable[[Path], object]


def _config(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return apply


def _says(**values: Any) -> Change:
    return _config(lambda config: config.update(values))


def _quantization(change: Callable[[dict[str, Any]], object]) -> Change:
    return _config(lambda config: change(config["quantization_config"]))


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD, metadata={"format": "pt"})

    return apply


def _as(name: str, dtype: torch.dtype) -> Change:
    return _tensors(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def _threshold(value: float) -> Change:
    return _tensors(lambda tensors: tensors.update({f"{Q}.threshold": torch.tensor(value)}))


def _header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Returns a change of the header, which may return its new text; the tensors' bytes stay."""

    def apply(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def _entry(**values: Any) -> Change:
    """Returns a change of one tensor's entry in the header."""
    return _header(lambda header: header[f"{Q}.lr_a"].update(values) and None)


def _twice(header: dict[str, Any]) -> bytes:
    name = f"{Q}.threshold"
    return json.dumps(header)[:-1].encode() + b"," + json.dumps({name: header[name]})[1:].encode()


def _overlapping(header: dict[str, Any]) -> None:
    other = f"{Q.replace('q_proj', 'k_proj')}.threshold"
    header[other]["data_offsets"] = header[f"{Q}.threshold"]["data_offsets"]


def _many_tensors(header: dict[str, Any]) -> bytes:
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    return json.dumps(header | {f"x{i}": empty for i in range(200_000)}).encode()


def _index(target: str, *, names: Callable[[list[str]], list[str]] = list, metadata: Any = None) -> Change:
    """Returns a change to an indexed checkpoint whose tensors are said to be in `target`; they are in a.safetensors."""

    def apply(folder: Path) -> None:
        stored = list(load_file(folder / SHARD))
        (folder / SHARD).rename(folder / "a.safetensors")
        weight_map = dict.fromkeys(names(stored), target.format(parent=folder.parent))
        index = {"metadata": {} if metadata is None else metadata, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def _both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def _moved_out(name: str) -> Change:
    """Returns a change that leaves a link in the place of a file, to where it lies outside of the folder."""

    def apply(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / f"outside-{name}")
        (folder / name).symlink_to(folder.parent / f"outside-{name}")

    return apply


def _link(name: str, target: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


def _pipe(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return apply


def _socket(folder: Path) -> None:
    # The path of a socket may have 108 bytes.
    here = os.getcwd()
    os.chdir(folder)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind("s")
    os.chdir(here)


def _folder(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return apply


def _write(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def _first_key(name: str, text: str) -> Change:
    """Returns a change that puts text in front of the first key of a JSON file."""
    return lambda folder: (folder / name).write_text("{" + text + "," + (folder / name).read_text().lstrip()[1:])


def _pickle(name: str) -> Change:
    """Returns a change that adds a pickle which makes the folder RAN where it is loaded."""
    return lambda folder: (folder / name).write_bytes(pickle.dumps(_Trap(str(folder / RAN))))


class _Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def _code(folder: Path) -> None:
    (folder / "trap.py").write_text(f"import os\nos.mkdir({str(folder / RAN)!r})\n")


_AUTO_MAP = {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}

# One table a kind; a case is the change and a part of the error of sparsify.load.
PLACES: dict[str, tuple[Change, str]] = {
    "index upwards": (_index("../a.safetensors"), "not a file name inside its folder"),
    "index absolute": (_index("{parent}/checkpoint/a.safetensors"), "not a file name inside its folder"),
    "index into a subfolder": (_index("b/a.safetensors"), "not a file name inside its folder"),
    "index with NUL": (_index("a\0.safetensors"), "not a file name inside its folder"),
    "index with a backslash": (_index("..\\a.safetensors"), "not a file name inside its folder"),
    "index with a surrogate": (_index("\ud800.safetensors"), "not a file name inside its folder"),
    "index with a name of 5,000": (_index("a" * 5000), "not a file name inside its folder"),
    "index to its folder": (_index("."), "not a file name inside its folder"),
    "index without a name": (_index(""), "not a file name inside its folder"),
    "index without tensors": (_index("a.safetensors", names=lambda names: []), "weight_map"),
    "index with metadata in a list": (_index("a.safetensors", metadata=[1]), "metadata"),
    "index that is a list": (_both(_index("a.safetensors"), _write(INDEX, b"[1]")), "weight_map"),
    "index of other tensors": (_index("a.safetensors", names=lambda names: ["x"]), "says that 'x' is in a.safetensors"),
    "index without a tensor": (_index("a.safetensors", names=lambda names: names[1:]), "is in no file, it is in a.saf"),
    "index to a folder": (
        _both(_index("b.safetensors"), _folder("b.safetensors")),
        "names b.safetensors, which is mis",
    ),
    "index to a pipe": (_both(_index("b.safetensors"), _pipe("b.safetensors")), "neither a file nor a folder"),
    "index to a link outside": (_both(_index("a.safetensors"), _moved_out("a.safetensors")), "outside of its folder"),
    "index to a pickle": (_both(_index("b.bin"), _pickle("b.bin")), "b.bin is not a safetensors file"),
    "weights are a pipe": (_pipe(SHARD), "neither a file nor a folder"),
    "weights are a folder": (_folder(SHARD), "neither model.safetensors nor"),
    "config is a pipe": (_pipe(CONFIG), "no config.json"),
    "config is /dev/zero": (_link(CONFIG, "/dev/zero"), "no config.json"),
    "config is a folder": (_folder(CONFIG), "no config.json"),
    "config is a link outside": (_moved_out(CONFIG), "outside of its folder"),
    "tokenizer is a link outside": (_moved_out("tokenizer.json"), "outside of its folder"),
    "tokenizer is a pipe": (_pipe("tokenizer.json"), "neither a file nor a folder"),
    "manifest is a link outside": (_moved_out(MANIFEST), "outside of its folder"),
    "manifest is a pipe": (_pipe(MANIFEST), "neither a file nor a folder"),
    "ledger is a pipe": (_pipe(LEDGER), "neither a file nor a folder"),
    "settings are a pipe": (_pipe(SETTINGS), "neither a file nor a folder"),
    "chat template is a pipe": (_pipe("chat_template.jinja"), "neither a file nor a folder"),
    "generation config is a pipe": (_pipe("generation_config.json"), "neither a file nor a folder"),
    "a socket": (_socket, "neither a file nor a folder"),
    "a link to a folder outside": (_link("more", "/etc"), "a link to /etc, which is outside of its folder"),
    "a link to itself": (_link("more", "more"), "neither a file nor a folder"),
}

HEADERS: dict[str, tuple[Change, str]] = {
    "a tensor twice": (_header(_twice), "stands twice"),
    "tensors that overlap": (_header(_overlapping), "begins at byte"),
    "end before begin": (_entry(data_offsets=[10, 4]), "its offsets hold"),
    "offsets far outside": (_entry(data_offsets=[1 << 40, (1 << 40) + 512]), "its offsets hold|begins at byte"),
    "three offsets": (_entry(data_offsets=[0, 1, 2]), "not two positions"),
    "offsets that are texts": (_entry(data_offsets=["0", "8"]), "not two positions"),
    "negative shape": (_entry(shape=[-1, 4]), "a list of up to 8 sizes"),
    "shape of truths": (_entry(shape=[True, True]), "a list of up to 8 sizes"),
    "shape that overflows": (_entry(shape=[1 << 33, 1 << 33]), "its offsets hold"),
    "shape that wraps to zero": (_entry(shape=[1 << 32, 1 << 32, 2]), "its offsets hold"),
    "shape of 100,000 dimensions": (_entry(shape=[1] * 100_000), "a list of up to 8 sizes"),
    "shape of 4,000 digits": (_entry(shape=[10**4000]), "a list of up to 8 sizes"),
    "unknown dtype": (_entry(dtype="F128"), "dtype 'F128'"),
    "dtype that is a list": (_entry(dtype=[]), "dtype"),
    "unknown key": (_entry(evil=1), "'evil'"),
    "entry that is a list": (_header(lambda h: h.update({f"{Q}.lr_a": []})), "not dtype, shape and data_offsets"),
    "nested deeply": (_header(lambda h: b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "a list": (_header(lambda h: b"[]"), "its header is a list"),
    "not UTF-8": (_header(lambda h: b'{"\xff": 1}'), "not JSON"),
    "99 MB of blanks": (_header(lambda h: json.dumps(h).encode() + b" " * 99_000_000), "allowed are"),
    "110 MB of blanks": (_header(lambda h: json.dumps(h).encode() + b" " * 110_000_000), "allowed are"),
    "200,000 empty tensors": (_header(_many_tensors), "allowed are"),
    "metadata of 50 MB": (_header(lambda h: h.update(__metadata__={"a": "x" * 50_000_000})), "allowed are"),
    "metadata of numbers": (_header(lambda h: h.update(__metadata__={"a": 1})), "metadata are not texts"),
    "another format": (_header(lambda h: h.update(__metadata__={"format": "tf"})), "format 'tf'"),
    "name with NUL": (_header(lambda h: h.update({"a\0b": h.pop("model.norm.weight")})), "not a tensor's name"),
    "name with a surrogate": (
        _header(lambda h: h.update({"\ud800": h.pop("model.norm.weight")})),
        "not a tensor's name",
    ),
    "name of 2,000": (_header(lambda h: h.update({"a" * 2000: h.pop("model.norm.weight")})), "not a tensor's name"),
    "bytes behind the last tensor": (
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + b"x" * 100),
        "the file has",
    ),
}

TENSORS: dict[str, tuple[Change, str]] = {
    "extra tensor": (_tensors(lambda t: t.update({"evil.weight": torch.zeros(3)})), "holds 'evil.weight', which"),
    "extra tensor and a wrong shape": (
        _tensors(lambda t: t.update({"evil.weight": torch.zeros(3), "model.norm.weight": torch.zeros(3)})),
        "holds 'evil.weight', which",
    ),
    "rank 3": (_tensors(lambda t: t.update({f"{Q}.lr_a": t[f"{Q}.lr_a"][None].contiguous()})), "has the shape"),
    "weight in int64": (_as(f"{Q}.weight", torch.int64), "stored as I64"),
    "weight in bool": (_as(f"{Q}.weight", torch.bool), "stored as BOOL"),
    "weight in complex": (_as(f"{Q}.weight", torch.complex64), "stored as C64"),
    "weight in float8": (_as(f"{Q}.weight", torch.float8_e4m3fn), "stored as F8_E4M3"),
    "norm in int32": (_as("model.norm.weight", torch.int32), "stored as I32"),
    "embedding in int8": (_as("model.embed_tokens.weight", torch.int8), "stored as I8"),
    "factor in float8": (_as(f"{Q}.lr_a", torch.float8_e4m3fn), "stored as F8_E4M3"),
    "factor in fp64": (_as(f"{Q}.lr_a", torch.float64), "stored as F64, BF16 is expected"),
    "factor in complex": (_as(f"{Q}.lr_a", torch.complex64), "stored as C64"),
    "threshold in fp64": (_as(f"{Q}.threshold", torch.float64), "stored as F64, F32 is expected"),
    "threshold is NaN": (_threshold(float("nan")), "not finite"),
    "threshold is infinite": (_threshold(float("inf")), "not finite"),
    "threshold is -infinite": (_threshold(float("-inf")), "not finite"),
    "threshold is -0": (_threshold(-0.0), "holds -0, which no conversion writes"),
    "threshold is negative": (_threshold(-5.0), "holds -5, it must be at least 0"),
}

SIZES: dict[str, tuple[Change, str]] = {
    "a million blocks": (_says(num_hidden_layers=10**6), "asks for 1,000,000 at 'num_hidden_layers'"),
    "a billion blocks": (_says(num_hidden_layers=10**9), "asks for 1,000,000,000"),
    "a million experts": (_says(num_local_experts=10**6), "asks for 1,000,000 at 'num_local_experts'"),
    "hidden size of a billion": (_says(hidden_size=10**9), "is expected"),
    "hidden size of 10^18": (_says(hidden_size=10**18), "overflow"),
    "hidden size of 10^30": (_says(hidden_size=10**30), "more than 64 bits"),
    "vocabulary of 10^12": (_says(vocab_size=10**12), "is expected"),
    "heads of a billion": (_says(head_dim=10**9), "bytes of masks and tables"),
    "rank of a billion": (_quantization(lambda c: c["linears"][Q].update(rank=10**9)), "the rank 1000000000"),
    "hidden size and rank of a billion": (
        _both(_quantization(lambda c: c["linears"][Q].update(rank=10**9)), _says(hidden_size=10**10)),
        "is expected|the rank",
    ),
    "12,000 linears": (
        _quantization(lambda c: c["linears"].update({f"x{i}": c["linears"][Q] for i in range(12_000)})),
        "linears has 12,014 entries",
    ),
    "a million names": (_quantization(lambda c: c["left_dense"].extend(["x"] * 10**6)), "some 1,000,"),
    "a list of a million": (_says(layer_types=["x"] * 10**6), "some 1,000,"),
}

JSON_BOMBS: dict[str, tuple[Change, str]] = {
    "nested 100,000 deep": (_write(CONFIG, b"[" * 100_000), "nested too deeply"),
    "number of 5,000 digits": (_first_key(CONFIG, f'"x": {"9" * 5000}'), "cannot be read"),
    "a key twice": (_first_key(CONFIG, '"hidden_size": 64'), "'hidden_size' stands twice"),
    "quantization_config twice": (_first_key(CONFIG, '"quantization_config": {}'), "stands twice"),
    "text of 50 MB": (_first_key(CONFIG, f'"x": "{"a" * 50_000_000}"'), "more than 8,388,608 bytes"),
    "10^6 empty lists": (_first_key(CONFIG, f'"x": [{"[]," * 10**6}1]'), "some 2,000,"),
    "index of 100,000 deep": (_both(_index("a.safetensors"), _write(INDEX, b"[" * 100_000)), "nested too deeply"),
}

REDIRECTS: dict[str, tuple[Change, str]] = {
    "other weights": (
        _both(lambda f: shutil.copy(f / SHARD, f / "evil.safetensors"), _says(transformers_weights="evil.safetensors")),
        "'transformers_weights'",
    ),
    "a fusion": (_says(fusion_config={"patch_embeddings": True}), "'fusion_config'"),
    "a distributed config": (_says(distributed_config={"tp_plan": "auto"}), "'distributed_config'"),
    "attention of the hub": (_says(attn_implementation="evil/kernel"), "names code on the hub"),
    "attention of the hub, privately": (_says(_attn_implementation={"": "evil/kernel"}), "names code on the hub"),
    "code for an unknown model": (_both(_code, _says(model_type="trap", auto_map=_AUTO_MAP)), "custom code"),
    "an adapter": (_write("adapter_config.json", b'{"peft_type": "LORA"}'), "would change the model"),
    "pickled weights alone": (_both(lambda f: (f / SHARD).unlink(), _pickle("pytorch_model.bin")), "neither model.saf"),
    "quantization_config further down": (
        _config(lambda c: c.update(text_config={"quantization_config": c.pop("quantization_config")})),
        "it must stand at the top",
    ),
    "a tensor-parallel quantization": (
        _quantization(lambda c: c.update(load_in_4bit=True)),
        "unknown key 'load_in_4bit'",
    ),
}

VALUES: dict[str, tuple[Change, str]] = {
    "schema 1.0": (_quantization(lambda c: c.update(schema_version=1.0)), "schema_version"),
    "method with an escape": (_quantization(lambda c: c.update(method="a\x1b[31m\nerror: b")), "method is"),
    "method of a million letters": (_quantization(lambda c: c.update(method="x" * 10**6)), "method is"),
    "allocation with a blank": (_quantization(lambda c: c.update(allocation="a b")), "allocation is"),
    "energy ranks below zero": (
        _quantization(lambda c: c["linears"][Q].update(energy_ranks=[-1, 1, 2])),
        "energy_ranks",
    ),
    "energy ranks of 10^30": (
        _quantization(lambda c: c["linears"][Q].update(energy_ranks=[1, 2, 10**30])),
        "energy_ranks",
    ),
    "calibration of -4": (_quantization(lambda c: c["calibration"].update(sequences=-4)), "sequences is -4"),
    "calibration without a hash": (_quantization(lambda c: c["calibration"].update(sha256="x")), "sha256 is"),
    "site twice": (_quantization(lambda c: c["sites"].append(c["sites"][0])), "do not name the same linears"),
    "cut that is a list": (_quantization(lambda c: c["linears"][Q].update(cut=[])), "cut"),
    "neurons without MLPs": (
        _quantization(lambda c: c.update(neurons={"cut": "prompt-top-k", "mlps": []})),
        "neurons.*no MLP",
    ),
    "neurons of a billion": (
        _quantization(
            lambda c: c.update(
                neurons={
                    "cut": "gate-threshold",
                    "mlps": [{"up": Q, "down": "b", "activation": "c", "neurons": 10**9, "gate": Q}],
                }
            )
        ),
        "not this model's",
    ),
    "dtype that is a function": (_says(dtype="load"), "could not be loaded"),
    "dtype of 8 bits": (_says(dtype="float8_e4m3fn"), "could not be loaded"),
    "padding token of a billion": (_says(pad_token_id=10**9), "could not be loaded"),
    "unknown activation": (_says(hidden_act="nope"), "could not be loaded"),
}

SIDE_FILES: dict[str, tuple[Change, str]] = {
    "generation config nested deeply": (_write("generation_config.json", b"[" * 100_000), "nested too deeply"),
    "generation config is a list": (_write("generation_config.json", b"[1]"), "not a mapping"),
    "generation config is no JSON": (_write("generation_config.json", b"\xff"), "cannot be read"),
    "tokenizer config nested deeply": (_write("tokenizer_config.json", b"[" * 100_000), "nested too deeply"),
    "tokenizer config is a list": (_write("tokenizer_config.json", b"[1]"), "not a mapping"),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {
        "place": PLACES, "header": HEADERS, "tensor": TENSORS, "size": SIZES, "json": JSON_BOMBS, "redirect": REDIRECTS,
        "value": VALUES, "side": SIDE_FILES,
    }.items()
    for name, case in cases.items()
}  # fmt: skip
# The plain way does not look at files that it does not read, and bounds neither config.json nor the index it reads.
PLAIN_LOADS = {
    "place: config is a link outside", "place: tokenizer is a link outside", "place: tokenizer is a pipe",
    "place: manifest is a link outside", "place: manifest is a pipe", "place: ledger is a pipe",
    "place: settings are a pipe", "place: chat template is a pipe", "place: generation config is a pipe",
    "place: a socket", "place: a link to a folder outside", "place: a link to itself",
    "redirect: a distributed config", "json: a key twice", "json: quantization_config twice",
    "json: text of 50 MB", "json: 10^6 empty lists",
    "side: generation config is no JSON", "side: tokenizer config nested deeply", "side: tokenizer config is a list",
}  # fmt: skip
PLAIN_TAKES_MEMORY = {
    "size: 12,000 linears",
    "json: text of 50 MB",
    "json: 10^6 empty lists",
    "size: a million names",
    "size: a list of a million",
}

_THEIRS = (
    SparsifyError, OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ImportError,
    StrictDataclassError, AssertionError,
)  # fmt: skip


@pytest.fixture(scope="module")
def warm(tiny_sparse: Path) -> Any:
    """The command line's app, in a process that has loaded a checkpoint once: imports are no growth of a case."""
    sparsify.load(tiny_sparse)
    app = build_app()
    result = CliRunner().invoke(app, ["eval", str(tiny_sparse), "--seq-len", "16", "--limit", "1"])
    assert result.exit_code == 0, result.output
    return app


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, warm: Any, tiny_sparse: Path, tmp_path: Path) -> None:
    change, message = CASES[case]
    folder = Path(shutil.copytree(tiny_sparse, tmp_path / "checkpoint"))
    change(folder)

    def check() -> None:
        before = _peak()
        with pytest.raises(CheckpointError, match=message) as refusal:
            sparsify.load(folder)
        _is_one_line(str(refusal.value))
        _is_refused_by_verify(folder)
        done = CliRunner().invoke(warm, ["eval", str(folder), "--text", "stdlib:evaluation", "--seq-len", "16"])
        # A folder without a config.json is no model at all: bad input.
        assert done.exit_code == (2 if message == "no config.json" else 3), done.output
        assert [line.startswith("error: ") for line in done.stderr.splitlines() if line.strip()][-1:] == [True]
        assert _peak() - before < MOST_GROWTH
        if case in PLAIN_LOADS:
            if case.startswith("place"):
                AutoModelForCausalLM.from_pretrained(folder)
        else:
            # transformers' own errors, before the plugin is asked, are of these.
            with pytest.raises(_THEIRS):
                AutoModelForCausalLM.from_pretrained(folder)
            assert case in PLAIN_TAKES_MEMORY or _peak() - before < MOST_GROWTH
        assert not (folder / RAN).exists()

    _in_child(check)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(("header", "tensor"))])
def test_the_plugin_refuses_what_it_can_see(case: str, tiny_sparse: Path, tmp_path: Path) -> None:
    """Of headers and tensors the plain way has the same clear error as sparsify.load."""
    change, message = CASES[case]
    folder = Path(shutil.copytree(tiny_sparse, tmp_path / "checkpoint"))
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


MANIFESTS: dict[str, Any] = {
    "upwards": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}},
    "absolute": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}},
    "in the middle": {"a/../../b": {"bytes": 1, "sha256": "0" * 64}},
    "backslash": {"..\\a": {"bytes": 1, "sha256": "0" * 64}},
    "NUL": {"a\0b": {"bytes": 1, "sha256": "0" * 64}},
    "surrogate": {"\ud800": {"bytes": 1, "sha256": "0" * 64}},
    "no name": {"": {"bytes": 1, "sha256": "0" * 64}},
    "size is NaN": {"a": {"bytes": float("nan"), "sha256": "0" * 64}},
    "size is negative": {"a": {"bytes": -1, "sha256": "0" * 64}},
    "size is a truth": {"a": {"bytes": True, "sha256": "0" * 64}},
    "hash is short": {"a": {"bytes": 1, "sha256": "0"}},
    "unknown key": {"a": {"bytes": 1, "sha256": "0" * 64, "mode": 1}},
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(case: str, tiny_sparse: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sparse, tmp_path / "checkpoint"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"].update(MANIFESTS[case])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=MANIFEST) as refusal:
        sparsify.verify(folder)
    _is_one_line(str(refusal.value))


@pytest.mark.parametrize(
    "content",
    [
        b"a: &a [x, x]\nb: [*a, *a]\n",
        b"model: !!python/object/apply:os.mkdir [ran]\n",
        b"model: " + b"[" * 20_000,
        b"model: " + b"9" * 10_000,
        b"model: 0x" + b"f" * 20_000,
        b"model: 2001-99-99\n",
        b"<<: [1]\n",
        b"? [1]\n: 2\n",
        b"model: a\nmodel: b\n",
        b"model: \x00\n",
        b"model: \xff\n",
        b"#" * 300_000,
    ],
    ids=lambda content: repr(content[:24]),
)
def test_yaml(content: bytes, warm: Any, tiny_sparse: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sparse, tmp_path / "checkpoint"))
    (folder / SETTINGS).write_bytes(content)

    def check() -> None:
        before = _peak()
        for code, arguments in ((3, ["eval", str(folder)]), (2, ["convert", "--config", str(folder / SETTINGS)])):
            done = CliRunner().invoke(warm, arguments)
            assert done.exit_code == code, done.output
            assert "Traceback" not in done.output
            assert "sparsify.yaml" in done.stderr.splitlines()[-1]
        assert _peak() - before < MOST_GROWTH
        assert not Path("ran").exists()

    _in_child(check)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"\xff\xff"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}}}'),
        ("tokenizer.json", b'{"version": "9", "added_tokens": [], "model": {}}'),
        ("tokenizer.json", b'{"a":' * 100_000),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["trap.T", "trap.T"]}}).encode()),
        ("tokenizer_config.json", json.dumps({"bos_token": [1]}).encode()),
        ("tokenizer_config.json", json.dumps({"model_max_length": []}).encode()),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_tokenizers(name: str, content: bytes, warm: Any, tiny_sparse: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sparse, tmp_path / "checkpoint"))
    (folder / name).write_bytes(content)
    _code(folder)
    done = CliRunner().invoke(warm, ["eval", str(folder), "--text", "stdlib:evaluation", "--seq-len", "16"])
    assert done.exit_code in (0, 3), done.output
    assert "Traceback" not in done.output
    assert not (folder / RAN).exists()
    if done.exit_code == 0:
        # What transformers reads all the same.
        assert any(name in problem for problem in sparsify.verify(folder))


def test_code_of_a_known_model_does_not_run(tiny_sparse: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sparse, tmp_path / "checkpoint"))
    _both(_code, _says(auto_map=_AUTO_MAP))(folder)
    expected = sparsify.load(tiny_sparse)(torch.arange(8)[None]).logits
    for load in (sparsify.load, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(load(folder)(torch.arange(8)[None]).logits, expected)
    assert not (folder / RAN).exists()


def test_pickles_beside_the_weights_are_not_opened(tiny_sparse: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sparse, tmp_path / "checkpoint"))
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        _pickle(name)(folder)
    sparsify.load(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    assert not (folder / RAN).exists()
    assert sparsify.verify(folder) == [
        f"{name}: not in the manifest" for name in ("optimizer.pt", "pytorch_model.bin", "training_args.bin")
    ]


def _is_refused_by_verify(folder: Path) -> None:
    try:
        problems = sparsify.verify(folder)
    except CheckpointError as refusal:
        problems = [str(refusal)]
    assert problems
    for problem in problems:
        _is_one_line(problem)


def _is_one_line(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 1000


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _in_child(check: Callable[[], None]) -> None:
    """Runs check in a forked process of its own memory, with an end; raises AssertionError with its traceback."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = ""
        try:
            signal.alarm(SECONDS)
            check()
        except BaseException:  # noqa: BLE001
            text = traceback.format_exc()
        finally:
            os.write(writer, text.encode(errors="replace")[:60_000])
            os._exit(bool(text))
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        text = file.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, text or f"ended with status {status}"
