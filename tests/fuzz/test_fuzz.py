"""Random damage to whole checkpoints and to each file's reader: refused, or the same model, or named by verify.

In the suite a fixed small number of examples, always the same. A long run, with others each time:

    SPARSIFY_FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz -s

which says at its end how many were refused, loaded as the same model, or loaded and named by `sparsify verify`.
Damage is made of JSON values that are swapped, dropped, renamed or put twice, of edited safetensors headers, and of
bytes that are flipped, cut, repeated or overwritten, up to three at once, in checkpoints of every kind of layer.
"""

import copy
import json
import os
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import sparsify
from sparsify.checkpoint import LEDGER, SETTINGS
from sparsify.cli.settings import ConvertSettings
from sparsify.config import SparsifyConfig
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.header import read_header
from sparsify.ledger import Ledger
from sparsify.manifest import MANIFEST, check_manifest, checkpoint_sha256
from sparsify.methods.cats import Cats
from sparsify.methods.griffin import Griffin
from sparsify.methods.larosa import Larosa
from sparsify.methods.relu import Relu
from sparsify.methods.statistical_topk import StatisticalTopK
from sparsify.methods.teal import Teal
from sparsify.methods.topk import TopK
from sparsify.model_config import check_implementations, check_model_config
from sparsify.preflight import INDEX, check_index
from sparsify.strict import read_json

EXAMPLES = int(os.environ.get("SPARSIFY_FUZZ_EXAMPLES") or 0)
# Always the same examples in the suite; others in a long run.
FUZZ = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
PARSERS = settings(FUZZ, max_examples=10 * EXAMPLES or 400)
SECONDS = 30
TOKENS = torch.arange(3, 19)[None]

METHODS: dict[str, Any] = {
    "rsparse": sparsify.RSparse(0.5, rho=0.8),
    "compensated": Teal(0.5, compensate=True),
    "top-k": TopK(0.5),
    "mean-std": StatisticalTopK(0.5),
    "rotated": Larosa(0.5, rotation="layer"),
    "gate-threshold": Cats(0.3),
    "prompt-top-k": Griffin(0.3),
    "relu": Relu(),
}
SHARDED = ("rsparse", "rotated")
JSON_FILES = ("config.json", MANIFEST, LEDGER, INDEX, "generation_config.json")

# What a value is replaced by, beside other values of the same document.
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63 - 1, 2**64, 10**30, -(2**63), 0.0, -0.0, 0.5, 1.0, 1e-300,
    1e308, float("nan"), float("inf"), float("-inf"), "", "0", "x", "/", "..", "../x", "a\0b", "\ud800", "\x1b[31m",
    "x" * 3000, "top-k", "mean-std", "dense", "model.layers.0", [], {}, [[]], [0], {"": 0}, ["x"], [None] * 50,
]  # fmt: skip

Files = dict[str, bytes]


class Subject:
    """A sound checkpoint: its folder, its files, and what it computes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: Files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.logits = _logits(sparsify.load(folder))

    @contextmanager
    def damaged(self, files: Files) -> Iterator[None]:
        """Inside, the folder holds these files."""
        changed = {name for name in self.files.keys() | files.keys() if self.files.get(name) != files.get(name)}
        try:
            for name in changed:
                _put(self.folder / name, files.get(name))
            yield
        finally:
            for name in changed:
                _put(self.folder / name, self.files.get(name))


def _put(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(data)


def _logits(model: Any) -> Tensor:
    """Returns the logits of a prompt and of a step after it, which runs sparse where the prompt runs dense."""
    with torch.inference_mode():
        prompt = model(TOKENS[:, :8], use_cache=True)
        step = model(TOKENS[:, 8:9], past_key_values=prompt.past_key_values)
        return torch.cat([prompt.logits, step.logits], dim=1)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    folder = tmp_path_factory.mktemp("fuzz")
    return {name: Subject(_convert(name, folder / name)) for name in METHODS}


def _convert(name: str, out: Path) -> Path:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, bos_token_id=0, eos_token_id=1, max_position_embeddings=64,
        hidden_act="relu" if name == "relu" else "silu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    sparsify.convert(model, METHODS[name], sparsify.Calibration(torch.randint(32, (2, 32)), "random tokens"))
    if name not in SHARDED:
        return sparsify.save(model, out, settings={"method": name})
    model.save_pretrained(out, max_shard_size="8KB")
    sound = sparsify.save(model, out.with_name(f"{name}-whole"), settings={"method": name})
    for extra in (LEDGER, SETTINGS):
        (out / extra).write_bytes((sound / extra).read_bytes())
    from sparsify.manifest import write_manifest

    write_manifest(out)
    return out


# Changes of a JSON document: pick walks to one of its values.


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


@st.composite
def _json_changes(draw: st.DrawFn, document: Any) -> str:
    """Draws the text of the document with one value changed, dropped, renamed, moved or put twice."""
    document = copy.deepcopy(document)
    places = [path for path in _places(document) if path]
    if not places:
        return json.dumps(draw(st.sampled_from(STRANGE)))
    path = draw(st.sampled_from(places))
    holder, key = _at(document, path[:-1]), path[-1]
    what = draw(st.sampled_from(["strange", "other", "nudge", "drop", "rename", "nest", "twice"]))
    if what == "strange":
        holder[key] = draw(st.sampled_from(STRANGE))
    elif what == "other":
        holder[key] = copy.deepcopy(_at(document, draw(st.sampled_from(places))))
    elif what == "nudge" and type(holder[key]) in (int, float):
        holder[key] += draw(st.sampled_from([-1, 1, 0.5, 1e-6]))
    elif what == "nudge" and isinstance(holder[key], str):
        holder[key] = holder[key][: draw(st.integers(0, len(holder[key])))] + draw(st.sampled_from(["", "x", "0", "/"]))
    elif what == "drop":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["x", "", f"{key}_", str(key).upper()]))] = holder.pop(key)
    elif what == "nest":
        holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}]))
    elif what == "twice" and isinstance(holder, dict):
        marker = "here, twice"
        holder[marker] = draw(st.sampled_from(STRANGE))
        return json.dumps(document).replace(json.dumps(marker), json.dumps(key))
    return json.dumps(document)


@st.composite
def _byte_changes(draw: st.DrawFn, data: bytes) -> bytes:
    """Draws the bytes with one bit flipped, or a slice cut, repeated, overwritten or put in."""
    if not data:
        return b"\0"
    begin = draw(st.integers(0, len(data) - 1))
    length = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
    what = draw(st.sampled_from(["flip", "flip", "cut", "end", "repeat", "overwrite", "insert"]))
    if what == "flip":
        return data[:begin] + bytes([data[begin] ^ (1 << draw(st.integers(0, 7)))]) + data[begin + 1 :]
    if what == "cut":
        return data[:begin] + data[begin + length :]
    if what == "end":
        return data[:begin]
    if what == "repeat":
        return data[: begin + length] + data[begin:]
    new = draw(st.sampled_from([b"\0", b"\xff", b"9", b'"', b"{", b"[", b",", b"NaN", b"-", b"\\u0000"])) * length
    return data[:begin] + new + data[begin + (len(new) if what == "overwrite" else 0) :]


@st.composite
def _header_changes(draw: st.DrawFn, data: bytes) -> bytes:
    """Draws a safetensors file with another header, whose length is right, or with another length."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return draw(_byte_changes(data))
    if draw(st.integers(0, 9)) == 0:
        return struct.pack("<Q", draw(st.sampled_from([0, 1, length - 1, length + 1, 10**8, 2**63]))) + data[8:]
    text = draw(_json_changes(header)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@st.composite
def _damage(draw: st.DrawFn, files: Files) -> Files:
    """Draws the files after one to three changes."""
    files = dict(files)
    weights = [name for name in files if name.endswith(".safetensors")]
    targets = ["config.json"] * 5 + weights * 3 + [MANIFEST, LEDGER, "generation_config.json", SETTINGS]
    targets += [INDEX] * 3 * (INDEX in files)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(targets))
        data = files.get(name)
        what = draw(st.sampled_from(["structure"] * 8 + ["bytes"] * 4 + ["remove", "exchange"]))
        if data is None or what == "remove":
            files.pop(name, None)
        elif what == "exchange":
            files[name] = files.get(draw(st.sampled_from(sorted(files))), b"")
        elif what == "bytes":
            files[name] = draw(_byte_changes(data))
        elif name in weights:
            files[name] = draw(_header_changes(data))
        else:
            try:
                files[name] = draw(_json_changes(json.loads(data))).encode()
            except (ValueError, RecursionError):
                files[name] = draw(_byte_changes(data))
    return files


OUTCOMES: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _report(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if EXAMPLES:
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        for outcome, count in sorted(OUTCOMES.items()):
            reporter.write_line(f"{count:8,} {outcome}")


@contextmanager
def _ends() -> Iterator[None]:
    """Fails what takes longer than SECONDS."""

    def fail(*_: Any) -> None:
        raise AssertionError(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", METHODS)
@FUZZ
@given(data=st.data())
def test_checkpoints(name: str, subjects: dict[str, Subject], data: st.DataObject) -> None:
    subject = subjects[name]
    files = data.draw(_damage(subject.files))
    with subject.damaged(files), _ends():
        try:
            problems = sparsify.verify(subject.folder)
        except CheckpointError as refusal:
            problems = [str(refusal)]
        for problem in problems:
            assert problem.isprintable()
            assert len(problem) < 1000
        # Only the manifest itself can be written in another way and say the same.
        changed = {name for name in files.keys() | subject.files.keys() if files.get(name) != subject.files.get(name)}
        assert problems or changed <= {MANIFEST}
        try:
            model = sparsify.load(subject.folder)
        except CheckpointError:
            OUTCOMES["refused by load"] += 1
            return
        try:
            same = torch.equal(_logits(model), subject.logits)
        except (SparsifyError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
            # A value of config.json that transformers takes and cannot run.
            same = False
        assert same or problems, "another model was loaded, and verify finds nothing wrong"
        OUTCOMES["loaded, the same logits" if same else "loaded, not the same, named by verify"] += 1


def _read(name: str) -> Callable[[Path], object]:
    """Returns the reader of one file of a checkpoint."""

    def config(path: Path) -> None:
        found = read_json(path, error=CheckpointError)
        if isinstance(found, dict):
            check_model_config(found)
            check_implementations(found)
            again = SparsifyConfig.from_dict(found.get("quantization_config")).to_dict()
            assert SparsifyConfig.from_dict(again).to_dict() == again

    def ledger(path: Path) -> None:
        found = Ledger.from_dict(read_json(path, error=CheckpointError))
        assert Ledger.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    def manifest(path: Path) -> None:
        checkpoint_sha256(path.parent)
        check_manifest(path.parent)

    return {
        "config.json": config,
        LEDGER: ledger,
        MANIFEST: manifest,
        INDEX: lambda path: check_index(path.parent),
        SETTINGS: ConvertSettings.from_yaml,
    }.get(name, read_header)


@pytest.mark.parametrize("name", ["config.json", LEDGER, MANIFEST, INDEX, SETTINGS, "weights"])
@PARSERS
@given(data=st.data())
def test_readers(name: str, subjects: dict[str, Subject], tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    subject = subjects[data.draw(st.sampled_from(SHARDED if name == INDEX else list(METHODS)))]
    file = next(n for n in subject.files if n.endswith(".safetensors")) if name == "weights" else name
    content = subject.files[file]
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            content = data.draw(_byte_changes(content))
        elif name == "weights":
            content = data.draw(_header_changes(content))
        else:
            with suppress(ValueError, RecursionError):
                content = data.draw(_json_changes(json.loads(content))).encode()
    with subject.damaged(subject.files | {file: content}), _ends():
        try:
            _read(name)(subject.folder / file)
            OUTCOMES[f"{name}: read"] += 1
        except SparsifyError:
            OUTCOMES[f"{name}: refused"] += 1
