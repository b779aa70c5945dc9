"""The kernel table: complete, consistent, and refusing what it cannot measure. No timing is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.errors import SparsifyError
from sparsify.evals import kernel_speed as module
from sparsify.evals.kernel_speed import kernel_speed, main, table
from sparsify.kernels import library, native

pytestmark = [
    pytest.mark.usefixtures("small_stream"),
    pytest.mark.skipif(library.missing() is not None, reason=str(library.missing())),
]
_SMALL = ["--inputs", "64", "--outputs", "48", "--rounds", "2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_side_is_measured(dtype: torch.dtype) -> None:
    found = kernel_speed(64, 48, dtype, rounds=2)
    assert list(found["sides"]) == ["ours 0%", "ours 50%", "ours 70%", "ours 90%", "torch", "torch, oneDNN off"]
    assert found["torch"] in ("torch", "torch, oneDNN off")
    size = 64 * 48 * dtype.itemsize
    for name, side in found["sides"].items():
        asked = float(name.split()[1].rstrip("%")) / 100 if name.startswith("ours") else 0.0
        assert side["realised_sparsity"] == pytest.approx(asked, abs=0.02)
        assert side["bytes"] == pytest.approx((1 - side["realised_sparsity"]) * size)
        assert side["gb_per_second"] == pytest.approx(side["bytes"] / side["ms"]["median"] / 1e6)
    assert found["sides"]["ours 0%"]["speedup"]["median"] == 1.0
    assert json.loads(json.dumps(found)) == found


def test_the_process_where_torch_was_fastest_is_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kernel.json"
    times = iter([3.0, 1.0, 2.0])
    one = kernel_speed(64, 48, torch.float32, rounds=1)

    def answer(command: list[str], **options: Any) -> Any:
        assert command[3:] == [
            "--inputs", "64", "--outputs", "48", "--dtype", "float32", "--rounds", "2",
            "--threads", str(torch.get_num_threads()), "--processes", "1", "--json",
        ]  # fmt: skip
        document = json.loads(json.dumps(one))
        document["sides"][document["torch"]]["ms"]["median"] = next(times)
        return type("Done", (), {"returncode": 0, "stdout": json.dumps(document), "stderr": ""})

    monkeypatch.setattr(module.subprocess, "run", answer)
    assert main([*_SMALL, "--dtype", "float32", "--save", str(file)]) == 0
    saved = json.loads(file.read_text())
    assert saved["sides"][saved["torch"]]["ms"]["median"] == 1.0
    assert len(saved["processes"]) == 3
    assert capsys.readouterr().out == table(saved) + "\n"


def test_a_process_of_its_own_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_SMALL, "--processes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == 64


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--inputs", "0"], "inputs, outputs and rounds must be at least 1, not 0"),
        (["--threads", "0"], "--threads must be at least 1, not 0"),
    ],
)
def test_bad_input(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_SMALL, *flags, "--processes", "1"]) == 2
    assert words in capsys.readouterr().err


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.run
    monkeypatch.setattr(module.native, "run", lambda x, site: [1.1 * y for y in right(x, site)])
    with pytest.raises(SparsifyError, match=r"wrong by 1\.0e-01 here, so it is not timed"):
        kernel_speed(64, 48, torch.float32, rounds=1)
