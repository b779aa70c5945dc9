"""Numbers and files as results show them."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from sparsify.cli.output import Format, Output, byte_count, common_prefix, percent, seconds, visible


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (999.7, "1.00 kB"), (9994, "9.99 kB"), (9996, "10.0 kB"),
     (11_534_336, "11.5 MB"), (999_600, "1.00 MB"), (7.25e9, "7.25 GB"), (3e15, "3000 TB")],
)  # fmt: skip
def test_byte_count(value: float | None, text: str) -> None:
    assert byte_count(value) == text


@pytest.mark.parametrize(("value", "text"), [(4.21, "4.2 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_percent() -> None:
    assert (percent(0.5), percent(None), percent(0.5, 0)) == ("50.0%", "-", "50%")


@pytest.mark.parametrize(
    ("names", "prefix"),
    [(["a.0.x", "a.1.x"], "a."), (["a.b.x", "a.b.y"], "a.b."), (["x", "y"], ""), (["a.b"], "a."), ([], "")],
)
def test_common_prefix(names: list[str], prefix: str) -> None:
    assert common_prefix(names) == prefix


def test_control_characters_cannot_reach_a_terminal() -> None:
    assert visible("a\n\tü\x1b[31m\x07\x9b\r") == "a\n\tü␛[31m␇␛␍"


def test_json_goes_to_stdout_and_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    output = Output(Format.json, path)
    with output.working():
        print("a library's chatter")
    output.emit({"folder": Path("ü")}, lambda console: Console().print("not this"))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(path.read_text(encoding="utf-8")) == {"folder": "ü"}
    assert captured.err == "a library's chatter\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
