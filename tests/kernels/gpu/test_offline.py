"""What the compiler makes of the kernels at the shapes of Llama-3-8B (bf16) and Llama-2-7B (fp16), without a GPU.

A launch must stay within its registers, stream weights from memory by the widest instructions, add up in fp32, and be
one of as few as the modules say. Limits are what was measured with Triton 3.7.1, and a tenth to a quarter above it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The compiler takes 45 seconds for 120 kernels.
pytestmark = pytest.mark.slow

TARGETS = ["sm_90", "sm_80", "gfx942"]
MULTIPROCESSORS = {"sm_90": 132, "sm_80": 108, "gfx942": 304}

Record = dict[str, Any]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Every launch of every case on every target, compiled in a process of its own, into a cache of its own."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    script, out = Path(__file__).with_name("offline.py"), folder / "found.json"
    done = subprocess.run([sys.executable, script, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[Record] = json.loads(out.read_text())
    return found


def of(records: list[Record], **wanted: object) -> list[Record]:
    found = [record for record in records if all(record[name] == value for name, value in wanted.items())]
    assert found, wanted
    return found


def name(record: Record) -> str:
    return f"{record['kernel']} of {record['case']} on {record['target']}"


def widths(record: Record, source: str) -> list[tuple[bool, int]]:
    """Whether the loads on lines of Python with this text are asynchronous, and of how many bytes."""
    found = []
    for line in record["loads"]:
        text, _, kind = line.rpartition(" | ")
        if source in text:
            found.append((kind.startswith("async"), int(kind.split()[-1])))
    return found


# ---- resources ----

# The most registers of a thread: measured (bf16 and fp16, sm_90 and sm_80), allowed.
REGISTERS = {
    "sparse_gemv of one token": (111, 128),
    "sparse_gemv of several tokens": (114, 128),
    "select": (64, 80),
    # One program of 8 warps: half of a multiprocessor's registers at 128.
    "add_norm": (128, 168),
    "decode_attention": (115, 128),
    "relu_rows": (64, 80),
    "gate_product": (30, 48),
}
# gfx942: measured 106, 121, 64, 59, 170, 60, 28.
VECTOR_REGISTERS = {
    "sparse_gemv of one token": 128,
    "sparse_gemv of several tokens": 168,
    "select": 96,
    "add_norm": 96,
    "decode_attention": 200,
    "relu_rows": 96,
    "gate_product": 48,
}


def kind(record: Record) -> str:
    if record["kernel"] != "sparse_gemv":
        return str(record["kernel"])
    return f"sparse_gemv of {'several tokens' if ' 8 ' in record['case'] else 'one token'}"


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(records: list[Record], target: str) -> None:
    for record in of(records, target=target):
        assert record["spilled"] == 0, name(record)


@pytest.mark.parametrize("target", TARGETS)
def test_registers(records: list[Record], target: str) -> None:
    seen = set()
    for record in of(records, target=target):
        most = VECTOR_REGISTERS[kind(record)] if target == "gfx942" else REGISTERS[kind(record)][1]
        assert record["registers"] <= most, name(record)
        seen.add(kind(record))
    assert seen == set(REGISTERS)


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_shared_memory_leaves_room_for_four_programs(records: list[Record], target: str) -> None:
    """Of 164 KB on an A100, 228 KB on an H100; measured 38 KB (attention)."""
    for record in of(records, target=target):
        assert record["shared"] <= 40 * 1024, name(record)


@pytest.mark.parametrize("target", TARGETS)
def test_products_fill_the_device(records: list[Record], target: str) -> None:
    """Two to six programs for each multiprocessor, at every shape."""
    for record in of(records, target=target, kernel="sparse_gemv"):
        programs = record["programs"][0] * record["programs"][1]
        assert 2 <= programs / MULTIPROCESSORS[target] <= 6, (name(record), record["programs"])


# ---- instructions ----


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_weights_are_streamed_by_the_widest_copies(records: list[Record], target: str) -> None:
    """16 bytes a thread, on their way to shared memory while the blocks before them are summed up."""
    for record in of(records, target=target, kernel="sparse_gemv"):
        assert set(widths(record, "tl.load(w +")) == {(True, 16)}, name(record)
        for _, width in widths(record, "tl.load(rows +"):
            assert width == 16, name(record)
    for kernel, sources in {
        "decode_attention": ("key_low = tl.load(", "key_high = tl.load(", "values + cache + s"),
        "relu_rows": ("tl.load(up +",),
    }.items():
        for record in of(records, target=target, kernel=kernel):
            assert all(set(widths(record, source)) == {(True, 16)} for source in sources), name(record)
    for record in of(records, target=target, kernel="select"):
        if record["case"].startswith("rsparse"):
            assert set(widths(record, "tl.load(a +")) == {(True, 16)}, name(record)


def test_weights_are_read_widely_on_amd(records: list[Record]) -> None:
    """8 bytes a thread where 256 threads share a block of 16 channels and 64 columns, 16 in all others."""
    for record in of(records, target="gfx942", kernel="sparse_gemv"):
        found = {width for _, width in widths(record, "tl.load(w +")}
        assert found in ({8}, {16}), name(record)
    for record in of(records, target="gfx942", kernel="decode_attention"):
        assert {width for _, width in widths(record, "key_low = tl.load(")} == {16}


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_partial_sums_are_read_past_the_first_cache(records: list[Record], target: str) -> None:
    sources = {"sparse_gemv": ("partial + other", "tl.load(sums"), "decode_attention": ("at[:, None] + e[None, :]",)}
    for kernel, lines in sources.items():
        for record in of(records, target=target, kernel=kernel):
            found = [line.rpartition(" | ")[2] for line in record["loads"] if any(source in line for source in lines)]
            assert found, name(record)
            assert all(kind.startswith("cg ") for kind in found), (name(record), found)


@pytest.mark.parametrize("target", TARGETS)
def test_one_atomic_for_a_program_and_no_loops_of_them(records: list[Record], target: str) -> None:
    """The count of programs that are done. A compare-and-swap would be a loop, as bf16 sums are on sm_80."""
    one = ["global_atomic_add"] if target == "gfx942" else ["atom.global.gpu.acq_rel.add.u32"]
    for record in of(records, target=target):
        counts = record["kernel"] in ("sparse_gemv", "decode_attention")
        assert record["atomics"] == (one if counts else []), name(record)


@pytest.mark.parametrize("target", TARGETS)
def test_sums_are_in_fp32(records: list[Record], target: str) -> None:
    for record in of(records, target=target, kernel="sparse_gemv"):
        by_tensor_cores = [product for product in record["products"] if re.match(r"mma|wgmma|v_mfma", product)]
        if kind(record).endswith("one token"):
            assert not by_tensor_cores
            assert {"fma.rn.f32", "v_fma_f32", "v_pk_fma_f32"} & set(record["products"]), name(record)
        else:
            assert by_tensor_cores, name(record)
        for product in by_tensor_cores:
            assert re.search(r"\.f32\.(bf16|f16)\.\1\.f32$|_f32_16x16x16_?(bf16|f16)", product), product
        # Products in half precision are exact roundings of act(gate) · up: there are no others.
        halves = [product for product in record["products"] if re.match(r"fma\S*f16|v_(?:pk_)?fma\w*f16", product)]
        gated = any("activated(value" in line for line in record["loads"])
        assert gated or not halves, (name(record), halves)


# ---- launches ----

LAUNCHES = {
    "q|k|v 1 masked": ["sparse_gemv"],
    "q|k|v 1 indexed": ["select", "sparse_gemv"],
    "q|k|v 8 masked": ["sparse_gemv"],
    "q|k|v 8 indexed": ["select", "sparse_gemv"],
    "rsparse q|k|v 1 masked": ["select", "sparse_gemv"],
    "rsparse q|k|v 8 masked": ["select", "sparse_gemv"],
    "mlp 1 masked": ["sparse_gemv", "sparse_gemv"],
    "mlp 1 indexed": ["select", "sparse_gemv", "select", "sparse_gemv"],
    "mlp 8 masked": ["sparse_gemv", "sparse_gemv"],
    "mlp 8 indexed": ["select", "sparse_gemv", "select", "sparse_gemv"],
    "relu mlp": ["sparse_gemv", "select", "relu_rows", "sparse_gemv"],
    "norm": ["add_norm"],
    "norm and lists": ["add_norm"],
    "attention": ["decode_attention"],
    "attention, norms and a window": ["decode_attention"],
    "gate product": ["gate_product"],
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches(records: list[Record], case: str) -> None:
    for target in TARGETS:
        found = [record["kernel"] for record in of(records, target=target, dtype="bfloat16", case=case)]
        assert found == LAUNCHES[case], target
