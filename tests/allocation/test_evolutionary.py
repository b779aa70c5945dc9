"""The evolutionary search: never worse than where it began, the same twice, and the same when it was interrupted."""

import copy
import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import sparsify
from sparsify import Calibration, RSparse, SparsifyError, Teal, TopK
from sparsify.allocation import evolutionary
from sparsify.allocation.evolutionary import Evolutionary
from sparsify.methods import Method

SMALL = Evolutionary(population=5, generations=3, group=9, windows=2)


def searched(model: PreTrainedModel, method: Method, calibration: Calibration, allocation: Evolutionary) -> Any:
    """Converts a copy of the model and returns its configuration."""
    return sparsify.convert(
        copy.deepcopy(model), method, calibration, allocation=allocation
    ).config.quantization_config  # fmt: skip


def held(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
@pytest.mark.parametrize("method", [Teal(sparsity=0.5), RSparse(sparsity=0.4)], ids=lambda method: method.name)
def test_it_only_gets_better_and_starts_at_uniform(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, method: Method, objective: str
) -> None:
    allocation = replace(SMALL, objective=objective, state=str(tmp_path / "state.json"))
    found = searched(tiny_llama, method, tiny_calibration, allocation)
    history = held(tmp_path / "state.json")["history"]
    best = [line["best"] for line in history]
    assert len(best) == 2 * 4
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]
    assert all(line["mean"] >= line["best"] for line in history)
    # With no generation, what is left is the best of the first individuals; uniform is one of them.
    alone = replace(allocation, population=4, generations=0, state=str(tmp_path / "none.json"))
    searched(tiny_llama, method, tiny_calibration, alone)
    uniform = evolutionary_fitness_of_uniform(tiny_llama, method, tiny_calibration, alone)
    assert best[0] <= uniform * (1 + 1e-5)
    assert held(tmp_path / "none.json")["history"][0]["best"] <= uniform * (1 + 1e-5)
    assert len({entry.sparsity for entry in found.linears.values()}) > 1


def evolutionary_fitness_of_uniform(
    model: PreTrainedModel, method: Method, calibration: Calibration, allocation: Evolutionary
) -> float:
    """The objective of allocation uniform, from the converted model itself, calibrated on the search's windows."""
    tokens = calibration.tokens[: allocation.windows]
    sparse = sparsify.convert(copy.deepcopy(model), method, Calibration(tokens, "the search's"), allocation="uniform")
    with torch.no_grad():
        dense, now = (m(tokens).logits.log_softmax(-1) for m in (model, sparse))
    if allocation.objective == "kl":
        return float((dense.exp() * (dense - now)).sum() / tokens.numel())
    return float(now[:, :-1].gather(-1, tokens[:, 1:, None]).mean().neg().exp())


def test_fitness_of_the_start_is_that_of_the_converted_uniform_model(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    measure = evolutionary._Search._fitness
    monkeypatch.setattr(
        evolutionary._Search, "_fitness", lambda self, genes: seen.append(measure(self, genes)) or seen[-1]
    )
    allocation = replace(SMALL, generations=0)
    searched(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation)
    expected = evolutionary_fitness_of_uniform(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation)
    assert seen[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", [Teal(sparsity=0.5), RSparse(sparsity=0.4, score="auto")], ids=lambda m: m.name)
def test_stopped_anywhere_it_ends_in_the_same_result(
    tiny_llama: PreTrainedModel,
    tiny_calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
) -> None:
    whole = searched(tiny_llama, method, tiny_calibration, replace(SMALL, state=str(tmp_path / "whole.json")))
    assert whole.to_dict() == searched(tiny_llama, method, tiny_calibration, SMALL).to_dict()
    broken = replace(SMALL, state=str(tmp_path / "broken.json"))
    measure, left = evolutionary._Search._fitness, [0]

    def fails(self: Any, genes: Any) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(self, genes)

    interruptions = 0
    with monkeypatch.context() as patch:
        patch.setattr(evolutionary._Search, "_fitness", fails)
        # One generation and a part of the next each time.
        for _ in range(20):
            left[0] = 7
            try:
                found = searched(tiny_llama, method, tiny_calibration, broken)
                break
            except KeyboardInterrupt:
                interruptions += 1
    assert interruptions == 7
    assert found.to_dict() == whole.to_dict()
    assert (tmp_path / "broken.json").read_text() == (tmp_path / "whole.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "whole.json"]


_PROGRAM = """
import sys, torch, sparsify
from sparsify.allocation.evolutionary import Evolutionary
tokens = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))
search = Evolutionary(population=6, generations=30, group=7, windows=2, state=sys.argv[2])
calibration = sparsify.Calibration(tokens, "random tokens")
sparsify.convert(sparsify.load_dense(sys.argv[1]), sparsify.Teal(0.5), calibration, allocation=search)
"""


@pytest.mark.slow
def test_killed_by_the_system_it_goes_on_to_the_same_result(tiny_dense: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    command = [sys.executable, "-c", _PROGRAM, str(tiny_dense)]
    subprocess.run([*command, str(whole)], check=True)
    with subprocess.Popen([*command, str(killed)]) as process:
        while not killed.exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(held(killed)["history"]) < len(held(whole)["history"])
    subprocess.run([*command, str(killed)], check=True)
    assert killed.read_text() == whole.read_text()


def test_a_finished_search_is_not_repeated(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation = replace(SMALL, state=str(tmp_path / "state.json"))
    first = searched(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation)
    monkeypatch.setattr(evolutionary._Search, "_fitness", None)
    assert searched(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation).to_dict() == first.to_dict()


def test_another_search_is_refused_by_name(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path
) -> None:
    allocation = replace(SMALL, generations=0, state=str(tmp_path / "state.json"))
    searched(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation)
    with pytest.raises(SparsifyError, match=r"state of another search: method\.sparsity differ"):
        searched(tiny_llama, Teal(sparsity=0.4), tiny_calibration, allocation)
    with pytest.raises(SparsifyError, match="another search: generations, seed differ"):
        searched(tiny_llama, Teal(sparsity=0.5), tiny_calibration, replace(allocation, generations=1, seed=1))
    other = Calibration(tiny_calibration.tokens.flip(0), "other")
    with pytest.raises(SparsifyError, match="another search: calibration differ"):
        searched(tiny_llama, Teal(sparsity=0.5), other, allocation)
    with torch.no_grad():
        tiny_llama.lm_head.weight[0, 0] += 1.0
    with pytest.raises(SparsifyError, match="another search: model differ"):
        searched(tiny_llama, Teal(sparsity=0.5), tiny_calibration, allocation)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1, "best": 3}'])
def test_other_files_are_refused_and_kept(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "state.json"
    file.write_text(content)
    with pytest.raises(SparsifyError, match=r"state\.json"):
        searched(tiny_llama, Teal(sparsity=0.5), tiny_calibration, replace(SMALL, state=str(file)))
    assert file.read_text() == content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"population": 3}, "population.*3.*≥ 4"),
        ({"generations": -1}, "generations.*-1"),
        ({"group": 0}, "group.*0"),
        ({"windows": True}, "windows.*True"),
        ({"objective": "ppl"}, "unknown objective 'ppl'"),
        ({"state": "/none/state.json"}, "folder that does not exist"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SparsifyError, match=words):
        Evolutionary(**options)


def test_token_cuts_and_recipes_are_refused(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
    with pytest.raises(SparsifyError, match=r"allocation evolutionary .* use allocation uniform"):
        sparsify.convert(tiny_llama, TopK(sparsity=0.5), tiny_calibration, allocation=SMALL)
    recipe = {"model.layers.0.mlp.up_proj": {"sparsity": 0.2, "rho": 0.9}}
    with pytest.raises(SparsifyError, match="so does the recipe"):
        sparsify.convert(tiny_llama, RSparse(0.5, recipe=recipe), tiny_calibration, allocation=SMALL)


def test_each_generation_is_logged_and_counted(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO, logger="sparsify.allocation.evolutionary"):
        sparsify.convert(
            tiny_llama, Teal(0.5), tiny_calibration, allocation=SMALL, progress=lambda *step: seen.append(step)
        )
    assert len(caplog.messages) == 8
    assert caplog.messages[-1].startswith("group 2 of 2, generation 3 of 3: best kl ")
    allocated = [step for step in seen if step[0] == "allocate"]
    assert allocated == [("allocate", done, 40) for done in range(1, 41)]
    assert SMALL.evaluations(14) == 40
    # The paper's setting on a model of 224 linears.
    assert Evolutionary().evaluations(224) == 1536


def test_children_stay_inside_and_are_made_of_others(tiny_llama: PreTrainedModel) -> None:
    parents = np.random.default_rng(0).random((6, 5, 3))
    children = evolutionary._Search._children(object.__new__(evolutionary._Search), parents, np.random.default_rng(1))
    assert children.shape == parents.shape
    assert children.min() >= 0.0
    assert children[..., 0].min() >= 0.01
    assert children.max() <= 1.0
    kept = (children == parents).mean()
    assert 0.3 < kept < 0.7
