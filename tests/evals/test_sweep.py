"""The frontier: how sparsities are written, where the knee is, and what goes on where it was stopped."""

from dataclasses import replace
from pathlib import Path

import pytest

import sparsify
from sparsify import SparsifyError
from sparsify.evals import sweep as module
from sparsify.evals.compare import Settings, Subject
from sparsify.evals.cost_table import CostTable
from sparsify.evals.sweep import Frontier, Point, knee, parse_sparsities, sparsest_within, sweep, table

SETTINGS = Settings(seq_len=16, limit=3, sequences=2)


@pytest.mark.parametrize(
    ("text", "sparsities"),
    [
        ("0.3..0.8", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        ("0.3..0.5:0.05", [0.3, 0.35, 0.4, 0.45, 0.5]),
        ("0.3..0.35", [0.3]),
        ("0.5,0.3", [0.3, 0.5]),
        ("0.5", [0.5]),
    ],
)
def test_sparsities(text: str, sparsities: list[float]) -> None:
    assert parse_sparsities(text) == sparsities


@pytest.mark.parametrize(
    "text", ["", "half", "0.8..0.3", "0.3..0.8:0", "0.3..0.8:-1", "0.1..0.9:1e-9", "0..0.5", "0.5,1", "nan", "0.3..nan"]
)
def test_bad_sparsities(text: str) -> None:
    with pytest.raises(SparsifyError, match=r"write 0\.3\.\.0\.8"):
        parse_sparsities(text)


def point(sparsity: float, perplexity: float) -> Point:
    return Point(sparsity, sparsity, round(1000 * (1 - sparsity)), perplexity, perplexity / 10 - 1, None)


def test_the_knee_is_where_the_curve_turns_up() -> None:
    points = [point(0.0, 10), point(0.2, 10.1), point(0.4, 10.3), point(0.6, 11), point(0.8, 40)]
    assert knee(points) == 0.6
    assert knee(points[:2]) is None
    # Above its chord everywhere: no knee.
    assert knee([point(0.0, 10), point(0.4, 30), point(0.8, 40)]) is None
    # Sparse is better than dense: no rise to speak of.
    assert knee([point(0.0, 10), point(0.4, 9), point(0.8, 9)]) is None
    assert sparsest_within(points, 0.03 + 1e-9) == 0.4
    assert sparsest_within(points, 0.001) is None


def test_points_are_measured_once(tiny_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one two three four\n" * 40)
    subject = Subject(str(tiny_dense), f"{file}#rest", f"{file}#held-out")
    model = sparsify.load_dense(str(tiny_dense))

    def run(sparsities: list[float], settings: Settings = SETTINGS) -> Frontier:
        return sweep(subject, "teal", sparsities, out=tmp_path, settings=settings, model=model, max_increase=10.0)

    first = run([0.3])
    cells = list(tmp_path.glob("cells-*.json"))
    assert len(cells) == 1
    content = cells[0].read_text()
    assert run([0.3]) == first
    assert cells[0].read_text() == content
    both = run([0.6, 0.3])
    assert [p.sparsity for p in both.points] == [0.0, 0.3, 0.6]
    assert both.points[:2] == first.points
    assert both.points[0].bytes > both.points[1].bytes > both.points[2].bytes
    assert both.sparsest_within == 0.6
    # Other settings stand in another file, and are not mixed up with these.
    other = run([0.3], replace(SETTINGS, limit=2))
    assert other.tokens < both.tokens
    assert run([0.6, 0.3]) == both
    text = table(both)
    assert "| 60.0% |" in text
    assert "sparsest within 10" in text
    monkeypatch.setattr("sparsify.__version__", "9.9")
    with pytest.raises(SparsifyError, match="other weights, texts or another sparsify"):
        run([0.3])


def test_costs_predict_a_speed_up_from_what_a_point_touches(tiny_dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one two three four\n" * 40)
    shapes = [{"outputs": o, "inputs": i, "count": c, "points": [[0.0, 0.0], [1.0, 1.0]]}
              for o, i, c in ((64, 64, 4), (32, 64, 4), (96, 64, 4), (64, 96, 2))]  # fmt: skip
    costs = CostTable({}, {}, "bfloat16", 0, 1, 1, 1, {"dense": 5.0}, 1.0, shapes, None)
    model = sparsify.load_dense(str(tiny_dense))
    subject = Subject(str(tiny_dense), str(file), str(file))
    found = sweep(subject, "teal", [0.5], out=tmp_path, settings=SETTINGS, model=model, costs=costs)
    assert found.points[0].predicted_speedup is None
    # 5 ms dense, 1 + 4 · 0.5 ms sparse.
    assert found.points[1].predicted_speedup == pytest.approx(5 / 3, rel=1e-3)
    assert module.marks(found, found.points[1]) == []
