"""The frontier of finetunings: the points, the table and the picture; runs that do not belong together are refused."""

from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import SparsifyError
from sparsify.evals.finetune_frontier import frontier_of, save_frontier_plot, shift_table, table
from sparsify.evals.sparsity_law import fit_law


def _run(method: str, factor: float, zeros: float, perplexity: float, **other: Any) -> dict[str, Any]:
    about = {"text_sha256": "a", "windows": 4, "seq_len": 64}
    shifts = [
        {"shift": 0.0, "mean": zeros, "perplexity": perplexity, "zeros": {"down": zeros}},
        {"shift": 0.1, "mean": zeros + 0.05, "perplexity": 1.01 * perplexity, "zeros": {"down": zeros + 0.05}},
    ]
    return {
        "method": method, "model": "m", "tokens": 100, "out": f"{method}{factor:g}", "stages": {"factors": [factor]},
        "measured": {
            "before": about | {"perplexity": 13.0},
            "after": about | {"perplexity": perplexity},
            "shifts": [] if method == "dense" else shifts,
        },
    } | other  # fmt: skip


DENSE = _run("dense", 0.0, 0.0, 12.0)


def test_points_are_ordered_and_compared_with_the_dense_model_of_the_same_tokens(tmp_path: Path) -> None:
    runs = [_run("prosparse", 0.4, 0.9, 13.0), _run("relu", 0.0, 0.7, 12.5), _run("prosparse", 0.1, 0.8, 12.6)]
    more = [{"model": "folder/relu0", "shift": 0.4, "mean": 0.85, "perplexity": 13.2}]
    points = frontier_of(DENSE, runs, more)
    assert [point["lambda"] for point in points] == [0.0, 0.1, 0.4]
    assert points[2]["sparsity"] == pytest.approx(0.95)
    assert points[2]["over_dense"] == pytest.approx(1.01 * 13.0 / 12.0 - 1.0)
    shown = table(points, DENSE)
    assert "| untouched | – | – | 13.000 | – | – | 13.000 | +8.3% |" in shown
    assert "| vanilla ReLU | 0 | 70.0% | 12.500 | 0.1 | 75.0% | 12.625 | +5.2% |" in shown
    assert shown.count("| ProSparse |") == 2
    shifts = shift_table(points, DENSE)
    assert "| λ | t 0 | t 0.1 | t 0.4 |" in shifts
    assert "| 0 | 70.0%, 12.500 (+4.2%) | 75.0%, 12.625 (+5.2%) | 85.0%, 13.200 (+10.0%) |" in shifts
    assert "| 95.0%, 13.130 (+9.4%) | – |" in shifts
    law = fit_law([0.0, 0.1, 0.2, 0.4], [70.0, 80.0, 84.0, 90.0])
    save_frontier_plot(points, law, 12.0, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_runs_of_other_tokens_or_texts_are_refused() -> None:
    with pytest.raises(SparsifyError, match="tokens is 200 in one run and 100 in the dense one"):
        frontier_of(DENSE, [_run("relu", 0.0, 0.7, 12.5, tokens=200)])
    other = _run("relu", 0.0, 0.7, 12.5)
    other["measured"]["before"]["text_sha256"] = "b"
    with pytest.raises(SparsifyError, match="the evaluation's text_sha256 is another one in relu0"):
        frontier_of(DENSE, [other])
