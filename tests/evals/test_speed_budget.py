"""Costs by shape, what they predict, and the sparsity that a speed-up needs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, SparsifyError, Teal
from sparsify.evals import cost_table
from sparsify.evals.cost_table import CostTable, ShapeCost, measure_costs, read_cost_table, touched_shares
from sparsify.evals.decoding import Decoded, Side
from sparsify.evals.speed_budget import check_speedup, measured_budget, sparsity_for


def table(**changes: Any) -> CostTable:
    shapes = [
        {"outputs": 4, "inputs": 8, "count": 2, "points": [[0.0, 0.0], [0.5, 3.0], [1.0, 4.0]]},
        {"outputs": 8, "inputs": 4, "count": 1, "points": [[0.0, 0.0], [1.0, 4.0]]},
    ]
    values: dict[str, Any] = {
        "machine": {}, "versions": {}, "dtype": "float32", "rest_bytes": 0, "prompt_tokens": 1, "steps": 1, "rounds": 1,
        "dense_ms": {"dense": 9.0, "dense-rows": 8.0}, "rest_ms": 2.0, "shapes": shapes, "waited_for_cpu": None,
    }  # fmt: skip
    return CostTable(**(values | changes))


def test_a_prediction_adds_up_shapes_and_the_rest() -> None:
    costs = table()
    assert ShapeCost(4, 8, 2, [[0.0, 0.0], [0.5, 3.0], [1.0, 4.0]]).ms(0.75) == pytest.approx(1.75)
    assert costs.best_dense == "dense-rows"
    assert costs.predicted_ms(0.0) == pytest.approx(10.0)
    assert costs.predicted_ms(0.5) == pytest.approx(2 + 3 + 2)
    assert costs.predicted_speedup(0.5) == pytest.approx(8 / 7)
    assert costs.speedup_of([(4, 8, 0.5), (4, 8, 1.0), (8, 4, 0.0)]) == pytest.approx(8 / (2 + 1.5 + 2))


def test_the_least_sparsity_that_is_fast_enough() -> None:
    # 2 + 6 (1 − s) + 4 (1 − s) = 8 / 2 below half the bytes.
    assert sparsity_for(table(), 2.0) == pytest.approx(0.8, abs=0.001)
    assert sparsity_for(table(), 1.01) < sparsity_for(table(), 1.5)
    with pytest.raises(SparsifyError, match=r"speedup of 4 cannot be had here: the largest that is predicted is 3\.20"):
        sparsity_for(table(), 4.0)


@pytest.mark.parametrize("value", [1.0, 0.5, 0, -2, float("nan"), float("inf"), True])
def test_bad_speedups(value: float) -> None:
    with pytest.raises(SparsifyError, match=r"speedup is .* above 1"):
        check_speedup(value)


def decode_by_formula(side: Side, tokens: torch.Tensor, prompt_tokens: int, **_: Any) -> Decoded:
    """A step takes 1 ms and 0.1 ms for each linear with all of its channels; half that at any other threshold."""
    kept = {-1.0: 1.0, float("inf"): 0.0}
    thresholds = dict.fromkeys(range(14), -1.0) if side.thresholds is None else side.thresholds
    ms = 1.0 + 0.1 * sum(kept.get(threshold, 0.5) for threshold in thresholds.values())
    if side.path == "transformers":
        ms *= 4
    return Decoded([ms / 1e3] * (tokens.shape[1] - prompt_tokens), tokens.float(), 0)


def test_costs_are_what_the_linears_take(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_table, "decode", decode_by_formula)
    found = measure_costs(tiny_llama, copy.deepcopy(tiny_llama), tiny_calibration, rounds=2)
    assert found.rest_ms == pytest.approx(1.0)
    assert found.dense_ms["dense"] == pytest.approx(2.4)
    for cost in found.costs.values():
        assert cost.points[-1] == [1.0, pytest.approx(0.1 * cost.count)]
        assert [ms for _, ms in cost.points[1:-1]] == pytest.approx([0.05 * cost.count] * 4)
    assert found.predicted_ms(0.0) == pytest.approx(2.4)


def test_weights_that_make_no_difference_are_refused(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_table, "decode", lambda side, tokens, prompt: Decoded([1e-3] * 40, tokens.float(), 0))
    with pytest.raises(SparsifyError, match=r"make no difference .* measure again when it is quiet"):
        measure_costs(tiny_llama, None, tiny_calibration, rounds=1)


def test_costs_are_measured_read_again_and_refused_elsewhere(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = copy.deepcopy(tiny_llama)
    # The real decoding; its times of a model this small may make no difference.
    monkeypatch.setattr(cost_table, "_scaled", lambda costs, total: costs)
    found = measure_costs(copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama), tiny_calibration, rounds=1)
    assert set(found.dense_ms) == {"dense", "dense-rows", "transformers"}
    assert {(c.outputs, c.inputs): c.count for c in found.costs.values()} == {
        (64, 64): 4, (32, 64): 4, (96, 64): 4, (64, 96): 2
    }  # fmt: skip
    for cost in found.costs.values():
        densities, ms = zip(*cost.points, strict=True)
        assert (densities[0], densities[-1], ms[0]) == (0.0, 1.0, 0.0)
        assert list(densities) == sorted(densities)
        assert list(ms) == sorted(ms)
    found.save(tmp_path / "costs.json")
    assert read_cost_table(tmp_path / "costs.json", dense) == found
    sparse = sparsify.convert(copy.deepcopy(dense), Teal(0.5), tiny_calibration)
    assert read_cost_table(tmp_path / "costs.json", sparse) == found
    assert len(touched_shares(sparse)) == 14
    assert all(share == pytest.approx(0.5) for _, _, share in touched_shares(sparse))
    result = measured_budget(sparse, dense, tiny_calibration, found, speedup=1.5, rounds=2)
    assert result.sparsity == 0.5
    assert result.predicted == pytest.approx(found.speedup_of(touched_shares(sparse)))
    assert result.measured.p10 <= result.measured.median <= result.measured.p90
    document = json.loads((tmp_path / "costs.json").read_text())
    for changes, words in (
        ({"machine": document["machine"] | {"threads": 99}}, r"another machine: threads 99, here \d"),
        ({"dtype": "bfloat16"}, "another model's shapes or dtype"),
        ({"shapes": document["shapes"][1:]}, "another model's shapes or dtype"),
        ({"schema_version": 0}, "not a cost table"),
        ({"rest_ms": "fast"}, "rest_ms"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(document | changes))
        with pytest.raises(SparsifyError, match=words):
            read_cost_table(tmp_path / "other.json", dense)


def test_windows_too_short_to_decode_in(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    short = Calibration(tiny_calibration.tokens[:, :8], "short")
    with pytest.raises(SparsifyError, match="windows of 8 tokens are too short to measure decoding: --seq-len 12"):
        measure_costs(tiny_llama, None, short)
