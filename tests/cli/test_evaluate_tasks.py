"""`sparsify eval --tasks`: the same numbers in both formats, and flags that do not go together."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparsify.evals import lm_eval_tasks

Run = Any


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one multiple-choice task over a local file."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'sparsify-llm[eval]'")
    rows = [{"q": f"def mean_{i}(", "choices": ["values):", "class"], "gold": 0} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"task: local_code\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return tmp_path


def test_human_output_fits_and_is_saved_as_json(
    run: Run, checkpoint: Path, dense_model: Path, tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tasks.json"
    result = run(
        "eval", checkpoint, dense_model, "--tasks", "local_code", "--include-path", tasks, "--limit", "3", "--save", out
    )
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "Protocol every-token: every token sparse" in said
    assert "Realised sparsity: local_code " in said
    assert max(map(len, result.stdout.splitlines())) <= 80
    converted, plain = json.loads(out.read_text())["models"]
    assert f"{converted['scores'][0]['sparse']['value']:.4f} ±" in result.stdout
    assert converted["lm_eval"]["sparse"]["results"]["local_code"]
    assert (converted["limit"], converted["batch_size"]) == (3, 8)
    assert [score["dense"]["value"] for score in converted["scores"]] == [
        score["dense"]["value"] for score in plain["scores"]
    ]
    assert "sparse" not in plain["scores"][0]


def test_json_goes_to_stdout_alone(run: Run, checkpoint: Path, tasks: Path) -> None:
    flags = ["--tasks", " local_code , local_code", "--include-path", tasks, "--protocol", "decode", "--log-samples"]
    data = json.loads(run("eval", checkpoint, *flags, "--format", "json").stdout)
    (entry,) = data["models"]
    assert data["protocol"] == entry["protocol"] == "decode"
    assert len(entry["lm_eval"]["dense"]["samples"]["local_code"]) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks", "local_code", "--text", "stdlib:evaluation"], "--text"),
        (["--tasks", "local_code", "--seq-len", "32"], "--seq-len"),
        (["--tasks", "local_code", "--limit", "0"], "at least 1 document"),
        (["--tasks", "local_code", "--num-fewshot", "-2"], "0 or more, not -2"),
        (["--tasks", "local_code", "--batch-size", "0"], "batch size must be at least 1, not 0"),
        (["--tasks", ""], "names with commas between"),
        (["--num-fewshot", "2"], "perplexity does not take --num-fewshot"),
        (["--log-samples"], "perplexity does not take --log-samples"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_do_not_go_together(run: Run, checkpoint: Path, flags: list[str], said: str) -> None:
    result = run("eval", checkpoint, *flags)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]


def test_without_lm_eval_the_command_says_what_to_install(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval_tasks.importlib.util, "find_spec", lambda name: None)
    result = run("eval", checkpoint, "--tasks", "piqa")
    assert result.exit_code == 4
    assert "pip install 'sparsify-llm[eval]'" in result.stderr
