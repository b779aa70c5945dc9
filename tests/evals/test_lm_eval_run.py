"""lm-eval tasks, dense and sparse side by side: tasks of one's own, local data for lm-eval's, and what is refused."""

import copy
import json
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals import lm_eval_tasks
from sparsify.evals.lm_eval_run import run_tasks
from sparsify.evals.lm_eval_tasks import SUITES, Tasks, load_tasks
from sparsify.evals.rouge import score_summary

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'sparsify-llm[eval]'")

_FOLDERS = {
    "hellaswag": "hellaswag", "piqa": "piqa", "arc_easy": "arc_easy", "arc_challenge": "arc_challenge",
    "boolq": "boolq", "winogrande": "winogrande", "openbookqa": "openbookqa", "lambada_openai": "lambada_openai",
    "truthfulqa_mc1": "truthfulqa_mc", "truthfulqa_mc2": "truthfulqa_mc", "wikitext": "wikitext",
}  # fmt: skip
_PIQA = [{"goal": f"To cut {i}", "sol1": "use a knife", "sol2": "use a spoon", "label": i % 2} for i in range(6)]


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder with a multiple-choice task, a generation task and a perplexity task over a local file."""
    rows = [{"q": f"What is {i} + {i}?", "right": str(2 * i), "wrong": str(3 * i + 1), "gold": 0} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        f"task: sums\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: gold\n"
        "doc_to_choice: '{{[right, wrong]}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (tmp_path / "write.yaml").write_text(
        f"task: write_sums\n{data}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_target: '{{right}}'\ngeneration_kwargs: {until: [zz], max_gen_toks: 6, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "text.yaml").write_text(
        f"task: text\n{data}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{q}}}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    return tmp_path


@pytest.fixture(scope="module")
def index() -> Any:
    """lm-eval's own index of 14,000 tasks, read once: it takes ten seconds and more."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def known(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets load_tasks find lm-eval's tasks in a copy of that index."""

    def manager(names: list[str], include_path: Path | None) -> Any:
        copied = copy.copy(index)
        copied._index = dict(index.task_index)
        return copied

    monkeypatch.setattr(lm_eval_tasks, "_manager", manager)


def _run(folder: Path, tasks: AbstractContextManager[Tasks], **settings: Any) -> dict[str, Any]:
    model = sparsify.load(folder, dtype="float32")
    with tasks as loaded:
        return run_tasks(model, sparsify.load_tokenizer(str(folder)), loaded, **settings)


def _score(result: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    (entry,) = (entry for entry in result["scores"] if (entry["task"], entry["metric"]) == (task, metric))
    found: dict[str, Any] = entry
    return found


@pytest.mark.parametrize("protocol", ["every-token", "decode"])
def test_both_sides_with_all_that_they_depend_on(tiny_sparse: Path, own_tasks: Path, protocol: str) -> None:
    names = ["sums", "write_sums", "text"]
    result = _run(tiny_sparse, load_tasks(names, include_path=own_tasks), protocol=protocol, limit=5, batch_size=4)
    assert list(result["tasks"]) == names
    for name, kind in zip(names, ("multiple_choice", "generate_until", "loglikelihood_rolling"), strict=True):
        about = result["tasks"][name]
        assert about["output_type"] == kind
        assert (about["documents"], about["documents_in_all"], about["num_fewshot"]) == (5, 6, 0)
        assert about["realised_sparsity"] == pytest.approx(0.5, abs=0.25)
        assert about["sparse_tokens"] > 0
    choice, perplexity = _score(result, "sums", "acc"), _score(result, "text", "word_perplexity")
    assert choice["recovery"] == choice["sparse"]["value"] / choice["dense"]["value"]
    assert choice["difference"] == pytest.approx(choice["sparse"]["value"] - choice["dense"]["value"])
    assert choice["dense"]["stderr"] is not None
    # Lower is better.
    assert perplexity["recovery"] == perplexity["dense"]["value"] / perplexity["sparse"]["value"]
    assert perplexity["dense"]["value"] != perplexity["sparse"]["value"]
    assert result["batch_size"] == 4
    assert len(result["checkpoint_sha256"]) == 64
    assert result["environment"]["packages"]["lm_eval"]
    assert set(result["lm_eval"]) == {"dense", "sparse"}
    assert result["lm_eval"]["sparse"]["results"]["sums"]["acc,none"] == choice["sparse"]["value"]
    assert "samples" not in result["lm_eval"]["dense"]
    json.dumps(result)


def test_decode_measures_other_tokens_than_every_token(tiny_sparse: Path, own_tasks: Path) -> None:
    every, decode = (
        _run(tiny_sparse, load_tasks(["sums"], include_path=own_tasks), protocol=protocol, log_samples=True)
        for protocol in ("every-token", "decode")
    )
    assert decode["tasks"]["sums"]["sparse_tokens"] < every["tasks"]["sums"]["sparse_tokens"]
    assert decode["lm_eval"]["sparse"]["samples"]["sums"] != every["lm_eval"]["sparse"]["samples"]["sums"]
    for one, two in zip(*(r["lm_eval"]["dense"]["samples"]["sums"] for r in (every, decode)), strict=True):
        assert one["prompt_hash"] == two["prompt_hash"]


def test_the_difference_is_of_the_same_documents(tiny_sparse: Path, own_tasks: Path) -> None:
    result = _run(tiny_sparse, load_tasks(["sums"], include_path=own_tasks), log_samples=True)
    score = _score(result, "sums", "acc_norm")
    dense, sparse = (
        torch.tensor([s["acc_norm"] for s in result["lm_eval"][side]["samples"]["sums"]], dtype=torch.float64)
        for side in ("dense", "sparse")
    )
    assert score["difference"] == pytest.approx(float((sparse - dense).mean()))
    assert score["difference_stderr"] == pytest.approx(float((sparse - dense).std() / 6**0.5))
    assert score["documents_changed"] == int((sparse != dense).sum())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_at_sparsity_0_scores_exactly_as_the_dense_model(
    tiny_dense: Path, own_tasks: Path, tmp_path: Path, dtype: str
) -> None:
    model, tokenizer = sparsify.load_dense(str(tiny_dense), dtype=dtype), sparsify.load_tokenizer(str(tiny_dense))
    names = ["sums", "write_sums", "text"]
    with load_tasks(names, include_path=own_tasks) as tasks:
        plain = run_tasks(model, tokenizer, tasks, batch_size=1)
        calibration = sparsify.Calibration(torch.randint(tokenizer.vocab_size, (4, 32)), "random tokens")
        sparsify.convert(model, sparsify.RSparse(sparsity=0.0), calibration)
        loaded = sparsify.load(sparsify.save(model, tmp_path / "zero", tokenizer))
        zero = run_tasks(loaded, tokenizer, tasks, batch_size=1)
    assert "sparse" not in plain["scores"][0]
    assert [s["dense"]["value"] for s in plain["scores"]] == [s["sparse"]["value"] for s in zero["scores"]]
    assert {s["recovery"] for s in zero["scores"]} <= {1.0, None}
    assert not any(s.get("documents_changed") for s in zero["scores"])


def test_git_says_nothing_outside_of_a_repository(
    tiny_sparse: Path,
    own_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    _run(tiny_sparse, load_tasks(["sums"], include_path=own_tasks), limit=1)
    assert "not a git repository" not in capfd.readouterr().err


def test_only_the_dense_side(tiny_sparse: Path, own_tasks: Path) -> None:
    result = _run(tiny_sparse, load_tasks(["sums"], include_path=own_tasks), only_dense=True)
    assert set(result["lm_eval"]) == {"dense"}
    assert "realised_sparsity" not in result["tasks"]["sums"]


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.usefixtures("known")
def test_lm_evals_own_tasks_run_on_local_files(tiny_sparse: Path, shared_data: Path) -> None:
    names = list(_FOLDERS)
    missing = [folder for folder in _FOLDERS.values() if not (shared_data / "eval" / folder).is_dir()]
    if missing:
        pytest.skip(f"no data of {', '.join(missing)} in {shared_data / 'eval'}")
    result = _run(tiny_sparse, load_tasks(names, data=shared_data / "eval"), limit=3, batch_size=4)
    assert list(result["tasks"]) == names
    for name in names:
        assert result["tasks"][name]["documents"] == 3
        assert result["tasks"][name]["realised_sparsity"] == pytest.approx(0.5, abs=0.25)
        assert any(entry["task"] == name for entry in result["scores"])
    assert _score(result, "wikitext", "word_perplexity")["higher_is_better"] is False


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_few_shot_examples_come_from_the_train_file(tiny_sparse: Path, tmp_path: Path) -> None:
    folder = tmp_path / "piqa"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in _PIQA)
    (folder / "validation.jsonl").write_text(lines)
    with pytest.raises(SparsifyError, match=r"no data for 2 few-shot examples .* put its train\.jsonl"):
        _run(tiny_sparse, load_tasks(["piqa"], data=tmp_path, num_fewshot=2), num_fewshot=2)
    (folder / "train.jsonl").write_text(lines.replace("knife", "blade"))
    result = _run(tiny_sparse, load_tasks(["piqa"], data=tmp_path, num_fewshot=2), num_fewshot=2, log_samples=True)
    assert result["tasks"]["piqa"]["num_fewshot"] == 2
    assert result["tasks"]["piqa"]["split"] == "validation"
    prompt = result["lm_eval"]["sparse"]["samples"]["piqa"][0]["arguments"][0][0]
    assert prompt.count("Question:") == 3
    assert "blade" in prompt or "spoon" in prompt


@pytest.mark.slow
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        (["helaswag"], SparsifyError, "no task 'helaswag'. Did you mean hellaswag"),
        (["rsparse-suit"], SparsifyError, "Did you mean rsparse-suite"),
        (["qqqqqqqqqq"], SparsifyError, "`lm_eval ls tasks` lists all"),
        (["piqa", ""], SparsifyError, "names with commas between"),
        (["piqa"], UnavailableError, r"the data of piqa cannot be loaded: .*--task-data"),
    ],
    ids=["near", "near-suite", "far", "empty", "offline"],
)
def test_tasks_that_cannot_be_had(names: list[str], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said), load_tasks(names):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_no_hub_and_no_local_data_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lm_eval_tasks, "hub_problem", lambda: "no route to host")
    with (
        pytest.raises(UnavailableError, match=r"piqa are on the hub.*no route to host.*--task-data"),
        load_tasks(["piqa"]),
    ):
        pass
    with (
        pytest.raises(SparsifyError, match=r"no data for task piqa: --task-data needs .*piqa/validation\.jsonl"),
        load_tasks(["piqa"], data=tmp_path),
    ):
        pass
    with pytest.raises(SparsifyError, match=r"xsum loads its data in Python"), load_tasks(["xsum"], data=tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("rows", ['{"goal": "To cut"', '{"question": "of another task"}\n'], ids=["no-json", "fields"])
def test_data_that_are_not_the_tasks_are_one_error(tmp_path: Path, rows: str) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(rows)
    with pytest.raises(SparsifyError, match="piqa cannot be loaded"), load_tasks(["piqa"], data=tmp_path):
        pass


def test_a_group_is_scored_as_a_whole_too(tiny_sparse: Path, own_tasks: Path) -> None:
    (own_tasks / "group.yaml").write_text(
        "group: both\ntask: [sums, {group: inner, task: [write_sums]}]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (own_tasks / "tagged.yaml").write_text("include: text.yaml\ntask: tagged_text\ntag: texts\n")
    result = _run(tiny_sparse, load_tasks(["both", "texts"], include_path=own_tasks), limit=2)
    assert set(result["tasks"]) == {"sums", "write_sums", "tagged_text"}
    assert _score(result, "both", "acc")["sparse"] == _score(result, "sums", "acc")["sparse"]


@pytest.mark.slow
def test_suites_name_tasks_that_there_are(index: Any) -> None:
    for suite in SUITES.values():
        assert set(suite) - {"xsum_rouge"} <= set(index.all_subtasks)


def test_rouge_is_that_of_the_summary_written() -> None:
    found = score_summary({"summary": "The cat sat on the mat"}, ["the cats sat on a mat"])
    # Of 6 words each, stemmed, 5 are the same (cat, sat, on, mat, one the) and 2 of 5 pairs: the cat, cat sat, sat on.
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})
    assert score_summary({"summary": "The cat sat"}, [""]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_articles_are_summarised(tiny_sparse: Path, tmp_path: Path) -> None:
    folder = tmp_path / "xsum_rouge"
    folder.mkdir()
    rows = [
        {"document": f"On day {day} it rained.\nThen it stopped.", "summary": f"Rain on day {day}."} for day in "123"
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = _run(tiny_sparse, load_tasks(["xsum_rouge"], data=tmp_path), limit=2, log_samples=True)
    assert {score["metric"] for score in result["scores"]} == {"rouge1", "rouge2", "rougeL"}
    assert result["tasks"]["xsum_rouge"]["split"] == "test"
    sample = result["lm_eval"]["dense"]["samples"]["xsum_rouge"][0]
    assert sample["arguments"][0][0].endswith("Then it stopped.\n\nSummary of the article in one sentence:")
    written = sample["resps"][0][0]
    assert "\n" not in written
    assert sample["rougeL"] == score_summary(rows[0], [written])["rougeL"]


def test_a_model_whose_prompts_choose_needs_prompts(tiny_dense: Path, own_tasks: Path, tmp_path: Path) -> None:
    model = sparsify.load_dense(str(tiny_dense), dtype="float32")
    sparsify.convert(model, sparsify.Griffin(0.3), sparsify.Calibration(torch.randint(0, 64, (4, 32)), "random"))
    sparsify.save(model, tmp_path / "griffin", sparsify.load_tokenizer(str(tiny_dense)))
    tasks = partial(load_tasks, ["sums"], include_path=own_tasks)
    with pytest.raises(SparsifyError, match=r"every-token has no prompt.*--protocol decode"):
        _run(tmp_path / "griffin", tasks())
    with pytest.raises(SparsifyError, match="no dense prompt in task text"):
        _run(tmp_path / "griffin", load_tasks(["text"], include_path=own_tasks), protocol="decode")
    result = _run(tmp_path / "griffin", tasks(), protocol="decode")
    assert 0.2 < result["tasks"]["sums"]["realised_sparsity"] < 0.4


def test_lm_eval_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"pip install 'sparsify-llm\[eval\]'"), load_tasks(["piqa"]):
        pass


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"limit": 0}, "limit must be at least 1 document a task, not 0"),
        ({"num_fewshot": -1}, "0 or more, not -1"),
        ({"batch_size": 0}, "batch size must be at least 1, not 0"),
        ({"protocol": "dense"}, "unknown protocol 'dense'"),
    ],
)
def test_bad_settings_are_refused(tiny_sparse: Path, own_tasks: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsifyError, match=said):
        _run(tiny_sparse, load_tasks(["sums"], include_path=own_tasks), **settings)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    for flag, option in (("--include-path", "include_path"), ("--task-data", "data")):
        folders: dict[str, Any] = {option: tmp_path / "nothing"}
        with pytest.raises(SparsifyError, match=f"{flag} .*nothing is not a folder"), load_tasks(["sums"], **folders):
            pass
