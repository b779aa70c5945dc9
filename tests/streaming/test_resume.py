"""Nothing is lost: kills, interruptions, full disks, changed sources, and what may be gone on with."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

import sparsify
from sparsify.errors import InterruptedConversionError, SparsifyError, UnavailableError
from sparsify.streaming import conversion
from sparsify.streaming.partial import Partial
from tests.streaming.conftest import MeanLogit, Setting, contents, random_llama, random_tokens

PARTIAL = ".out.partial"


class _StopError(Exception):
    pass


def stop_after(units: int) -> Callable[[str, int, int], None]:
    """Returns a progress that raises when so many units are done."""

    def progress(stage: str, done: int, total: int) -> None:
        if done == units:
            raise _StopError

    return progress


@pytest.fixture
def stopped(setting: Setting, tmp_path: Path) -> Path:
    """`out` of a conversion that stopped after one of three blocks."""
    with pytest.raises(_StopError):
        setting.stream(tmp_path / "out", progress=stop_after(2))
    return tmp_path / "out"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 5_000_000_000], ids=["shards", "one-file"])
def test_a_kill_at_every_write_point_is_resumed_to_the_same_bytes(repository: Path, tmp_path: Path, limit: int) -> None:
    model = random_llama(tmp_path / "tiny")
    (tmp_path / "work").mkdir()
    program = repository / "tests" / "streaming" / "kill_points.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, str(program), str(model), str(tmp_path / "work"), str(limit)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert found["points"] > (60 if limit == 0 else 20)


class TestGoingOn:
    def test_from_the_last_finished_block(self, setting: Setting, stopped: Path, expected: dict[str, bytes]) -> None:
        done: list[int] = []
        setting.stream(stopped, resume=True, progress=lambda stage, unit, total: done.append(unit))
        assert done == [3, 4]
        assert contents(stopped.parent) == {f"out/{name}": data for name, data in expected.items()}

    def test_with_an_evaluation(self, setting: Setting, tmp_path: Path) -> None:
        whole = setting.stream(tmp_path / "whole" / "out", evaluation=MeanLogit())
        assert whole.measured is not None
        assert whole.measured["dense"] != whole.measured["sparse"]
        with pytest.raises(_StopError):
            setting.stream(tmp_path / "part" / "out", evaluation=MeanLogit(), progress=stop_after(3))
        again = setting.stream(tmp_path / "part" / "out", evaluation=MeanLogit(), resume=True)
        assert again.measured == whole.measured
        assert contents(tmp_path / "part") == contents(tmp_path / "whole")
        # What carried states give is what the whole models give.
        dense, sparse = sparsify.load_dense(str(setting.model)), sparsify.load(whole.out)
        for name, model in (("dense", dense), ("sparse", sparse)):
            with torch.inference_mode():
                logits = [model(input_ids=b, use_cache=False).logits.double() for b in MeanLogit().batches(model)]
            assert whole.measured[name] == pytest.approx(float(torch.cat([x.flatten() for x in logits]).mean()))

    def test_nothing_to_go_on_with_starts(self, setting: Setting, tmp_path: Path, expected: dict[str, bytes]) -> None:
        setting.stream(tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == expected

    def test_a_finished_folder_is_kept(self, setting: Setting, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(SparsifyError, match="exists already"):
            setting.stream(tmp_path / "out", resume=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_only_when_asked(self, setting: Setting, stopped: Path) -> None:
        with pytest.raises(SparsifyError, match=r"1 blocks are done.*--resume.*or remove it"):
            setting.stream(stopped)

    @pytest.mark.parametrize(
        ("other", "named"),
        [
            ({"method": sparsify.Teal(sparsity=0.6)}, "method"),
            ({"calibration": random_tokens(windows=4)}, "calibration sequences"),
            ({"dtype": "float32"}, "dtype"),
            ({"prefill": "dense"}, "prefill"),
            ({"settings": {"seed": 1}}, "setting seed"),
            ({"evaluation": MeanLogit()}, "evaluation sha256"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_never_with_something_else(
        self, setting: Setting, stopped: Path, other: dict[str, Any], named: str, expected: dict[str, bytes]
    ) -> None:
        options = dict(other)
        changed = Setting(
            setting.model, options.pop("method", setting.method), options.pop("calibration", setting.calibration)
        )
        with pytest.raises(SparsifyError, match=rf"begun with other things than now: .*{named} \("):
            changed.stream(stopped, resume=True, **options)
        # Nothing was spoilt.
        setting.stream(stopped, resume=True)
        assert contents(stopped) == expected

    def test_nor_with_other_versions(self, setting: Setting, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conversion, "__version__", "9.9")
        with pytest.raises(SparsifyError, match=r"sparsify \(.* then, 9\.9 now\)"):
            setting.stream(stopped, resume=True)

    def test_damaged_states_are_refused(self, setting: Setting, stopped: Path) -> None:
        states = next((stopped.parent / PARTIAL / "units").glob("carried-*"))
        data = bytearray(states.read_bytes())
        data[7] ^= 1
        states.write_bytes(data)
        with pytest.raises(SparsifyError, match="is not as it was written"):
            setting.stream(stopped, resume=True)

    def test_a_damaged_block_is_refused(self, setting: Setting, stopped: Path) -> None:
        unit = stopped.parent / PARTIAL / "units" / "unit-00001.safetensors"
        data = bytearray(unit.read_bytes())
        data[-1] ^= 1
        unit.write_bytes(data)
        with pytest.raises(SparsifyError, match="is not as it was written"):
            setting.stream(stopped, resume=True)
        assert not stopped.exists()


class TestChangedSources:
    @pytest.fixture
    def own(self, setting: Setting, tmp_path: Path) -> Setting:
        folder = tmp_path / "source" / setting.model.name
        shutil.copytree(setting.model, folder)
        return Setting(folder, setting.method, setting.calibration)

    def test_while_it_is_converted(self, own: Setting, tmp_path: Path) -> None:
        def touch(stage: str, done: int, total: int) -> None:
            if done == 2:
                os.utime(own.model / "model.safetensors", (1, 1))

        with pytest.raises(SparsifyError, match=r"source was changed.*model\.safetensors has another time of modif"):
            own.stream(tmp_path / "out", progress=touch)
        assert not (tmp_path / "out").exists()

    def test_between_two_processes(self, own: Setting, tmp_path: Path) -> None:
        with pytest.raises(_StopError):
            own.stream(tmp_path / "out", progress=stop_after(2))
        config = own.model / "config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        with pytest.raises(SparsifyError, match=r"source file config\.json"):
            own.stream(tmp_path / "out", resume=True)

    def test_with_the_same_size_and_time(self, own: Setting, tmp_path: Path) -> None:
        with pytest.raises(_StopError):
            own.stream(tmp_path / "out", progress=stop_after(2))
        weights = own.model / "model.safetensors"
        before, data = weights.stat(), bytearray(weights.read_bytes())
        start = len(data) // 2
        data[start:] = bytes(len(data) - start)
        data[-5000:] = bytes(b ^ 1 for b in data[-5000:])
        weights.write_bytes(bytes(b ^ 1 if i >= 4000 else b for i, b in enumerate(data)))
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(SparsifyError, match="source was changed since block 1"):
            own.stream(tmp_path / "out", resume=True)


@pytest.fixture
def no_bars() -> Iterator[None]:
    """transformers draws no bar: pytest captures it in a file, which a limit on files holds, too."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    yield
    if shown:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class TestStops:
    def test_the_first_ctrl_c_finishes_the_block(
        self, setting: Setting, tmp_path: Path, expected: dict[str, bytes]
    ) -> None:
        said: list[str] = []
        real = conversion.BlockConverter.convert

        def interrupted(self: Any, index: int) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return real(self, index)

        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(conversion.BlockConverter, "convert", interrupted)
            with pytest.raises(InterruptedConversionError) as stopped:
                setting.stream(tmp_path / "out", note=said.append)
        assert stopped.value.exit_code == 130
        assert "interrupted after 1 of 3 blocks: the same command with --resume" in str(stopped.value)
        assert any("Ctrl-C again stops at once" in line for line in said)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        setting.stream(tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == expected

    def test_the_second_stops_at_once(self, setting: Setting, tmp_path: Path, expected: dict[str, bytes]) -> None:
        def interrupted(self: Any, index: int) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")

        with pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(conversion.BlockConverter, "convert", interrupted)
            with pytest.raises(InterruptedConversionError, match="at once"):
                setting.stream(tmp_path / "out")
        setting.stream(tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == expected

    def test_two_runs_on_one_folder(self, setting: Setting, stopped: Path, expected: dict[str, bytes]) -> None:
        with Partial(stopped), pytest.raises(UnavailableError, match=rf"another process \({os.getpid()}\)"):
            setting.stream(stopped, resume=True)
        setting.stream(stopped, resume=True)
        assert contents(stopped) == expected

    @pytest.mark.parametrize("limit", [100, 5_000, 40_000], ids="{} bytes".format)
    @pytest.mark.usefixtures("no_bars")
    def test_a_full_disk(self, setting: Setting, tmp_path: Path, limit: int, expected: dict[str, bytes]) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UnavailableError, match=r"the disk is full.*--resume"):
                setting.stream(tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)
        assert not (tmp_path / "out").exists()
        setting.stream(tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == expected

    def test_a_disk_that_has_no_room_to_begin_with(
        self, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
        with pytest.raises(UnavailableError, match=r"0\.00 GB free .* are still to be written"):
            setting.stream(tmp_path / "out")

    @pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
    def test_modes_follow_the_umask(self, setting: Setting, tmp_path: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            setting.stream(tmp_path / "out")
        finally:
            os.umask(before)
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_an_error_before_anything_is_finished_leaves_nothing(setting: Setting, tmp_path: Path) -> None:
    foreign = sparsify.Calibration(torch.full((1, 8), 999), "other tokenizer")
    with contextlib.suppress(SparsifyError):
        Setting(setting.model, setting.method, foreign).stream(tmp_path / "out")
    with pytest.raises(SparsifyError):
        Setting(setting.model, sparsify.RSparse(sparsity=0.99, rho=0.5), setting.calibration).stream(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
