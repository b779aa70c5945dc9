"""The held-out part of a text: disjoint from the rest, nothing lost, named by a spec."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify import SparsifyError, read_text
from sparsify.hold_out import split_documents


@given(st.lists(st.text(alphabet="ab\n", min_size=1, max_size=30), max_size=8))
def test_nothing_is_lost_and_nothing_is_twice(documents: list[str]) -> None:
    rest, held_out = split_documents(documents)
    assert "".join(rest + held_out) == "".join(documents)
    assert all(rest + held_out)
    if documents:
        longest = max(map(len, documents))
        assert len("".join(rest)) >= 0.75 * sum(map(len, documents)) - 0.5
        assert len("".join(rest)) <= 0.75 * sum(map(len, documents)) + longest


def test_a_quarter_is_cut_at_a_line() -> None:
    lines = [f"line {index:03d}\n" for index in range(100)]
    rest, held_out = split_documents(["".join(lines)])
    assert (rest, held_out) == (["".join(lines[:76])], ["".join(lines[76:])])
    assert split_documents(["a" * 8]) == (["a" * 6], ["a" * 2])
    assert split_documents(["aaa", "bbb", "cc"]) == (["aaa", "bbb"], ["cc"])


def test_a_spec_names_a_part(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\ntwo\nsix\nten\n")
    rest, held_out = (read_text(f"{file}{part}") for part in ("#rest", "#held-out"))
    assert (rest.name, rest.documents) == ("text.txt#rest", ["one\ntwo\nsix\nten\n"[:12]])
    assert (held_out.name, held_out.documents) == ("text.txt#held-out", ["ten\n"])
    rest, held_out = (read_text(f"stdlib:calibration{part}") for part in ("#rest", "#held-out"))
    assert held_out.name == "stdlib:calibration#held-out"
    assert rest.bytes + held_out.bytes == read_text("stdlib:calibration").bytes
    assert 0.24 < held_out.bytes / (rest.bytes + held_out.bytes) < 0.26


def test_a_part_that_is_empty_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a")
    with pytest.raises(SparsifyError, match=r"text\.txt#held-out is empty"):
        read_text(f"{file}#held-out")
