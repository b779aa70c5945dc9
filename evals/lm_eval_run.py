"""Tasks of lm-eval on one model, dense and sparse on the same requests, by lm-eval's own `simple_evaluate`.

The dense side is the same weights with sparsity switched off, in the same protocol (`lm_eval_model`) and the same
batches. Recovery is sparse over dense, or dense over sparse where lower is better, as of a perplexity; scores near
chance recover whatever the sparsity. Not covered: several processes, chat templates, tasks that run generated code.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.errors import SparsifyError
from sparsify.evals.lm_eval_tasks import Tasks, split_of
from sparsify.evals.machine import environment
from sparsify.evals.perplexity import check_sparse_protocol
from sparsify.ledger import ledger_of
from sparsify.manifest import checkpoint_sha256
from sparsify.runtime import dense, sparse_layers

# Of measures that are no means, as perplexities: lm-eval's own 100,000 take minutes.
_BOOTSTRAP = 1000
STATEMENTS = {
    "every-token": "every token sparse, context and continuation; no decode step is run but in generation",
    "decode": "context dense but its last token, which runs sparse with the continuation on its cache; generation: "
    "prompt dense, every decode step sparse",
}


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    protocol: str = "every-token",
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    only_dense: bool = False,
    log_samples: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Returns the scores of both sides, and under "lm_eval" lm-eval's results of each side whole.

    limit: documents a task at most. log_samples keeps every document and answer in the results. progress is called
    with ("dense, TASK", requests done, requests in all). Raises SparsifyError for a bad setting.
    """
    check_settings(limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    from sparsify.evals.lm_eval_model import SparsifyLM

    sides = ("dense",) if only_dense or not sparse_layers(model) else ("dense", "sparse")
    if "sparse" in sides:
        check_sparse_protocol(model, protocol)
    evaluated = SparsifyLM(model, tokenizer=tokenizer, protocol=protocol, batch_size=batch_size)
    found: dict[str, dict[str, Any]] = {}
    for side in sides:
        evaluated.progress = _named(side, progress)
        evaluated.truncated.clear()
        with dense(model) if side == "dense" else nullcontext():
            found[side] = _simple_evaluate(evaluated, tasks, limit, num_fewshot, batch_size)
    samples = {side: results["samples"] for side, results in found.items()}
    _check_same_requests(samples)
    about = {name: _about(name, task, found["dense"], evaluated) for name, task in tasks.by_name.items()}
    if "sparse" in found:
        for name, counted in evaluated.realised.items():
            realised = ledger_of(model).with_densities(counted.densities())
            about[name]["realised_sparsity"] = realised.weighted_sparsity if counted.tokens else None
            about[name]["sparse_tokens"] = counted.tokens
    result = {
        "protocol": protocol,
        "statement": STATEMENTS[protocol],
        "batch_size": batch_size,
        "limit": limit,
        "padding": "none: only requests of one length share a batch",
        "tasks": about,
        "scores": list(_scores(found, samples)),
        "checkpoint_sha256": _checkpoint_hash(model),
        "environment": environment(model.device)
        | {"packages": {name: version(name) for name in ("lm_eval", "datasets")}},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if not log_samples:
        for results in found.values():
            del results["samples"]
    return result | {"lm_eval": found}


def check_settings(*, limit: int | None = None, num_fewshot: int | None = None, batch_size: int = 1) -> None:
    """Raises SparsifyError for a setting that no run can have: for before the work, which is long."""
    if limit is not None and limit < 1:
        raise SparsifyError(f"the limit must be at least 1 document a task, not {limit}")
    if num_fewshot is not None and num_fewshot < 0:
        raise SparsifyError(f"the number of few-shot examples must be 0 or more, not {num_fewshot}")
    if batch_size < 1:
        raise SparsifyError(f"the batch size must be at least 1, not {batch_size}")


def _simple_evaluate(evaluated: Any, tasks: Tasks, limit: int | None, num_fewshot: int | None, size: int) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    with _git_unheard():
        results = simple_evaluate(
            model=evaluated,
            tasks=tasks.specs,
            task_manager=tasks.manager,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=size,
            bootstrap_iters=_BOOTSTRAP,
        )
    return json.loads(json.dumps(results, default=handle_non_serializable))


@contextmanager
def _git_unheard() -> Iterator[None]:
    """Inside, the git that lm-eval asks for a hash says nothing: outside of a repository it is "fatal: ..."."""
    from lm_eval import evaluator

    ask = evaluator.get_git_commit_hash

    def unheard() -> Any:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            return ask()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)

    evaluator.get_git_commit_hash = unheard
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask


def _about(name: str, task: Any, results: dict[str, Any], evaluated: Any) -> dict[str, Any]:
    return {
        "output_type": task.OUTPUT_TYPE,
        "split": split_of(task),
        "documents": results["n-samples"][name]["effective"],
        "documents_in_all": results["n-samples"][name]["original"],
        "num_fewshot": results["n-shot"][name],
        "version": results["versions"][name],
        "truncated_requests": evaluated.truncated[name],
    }


def _scores(found: dict[str, Any], samples: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields one entry for every number that lm-eval gives for a task or group."""
    baseline = found["dense"]
    for task, values in baseline["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            higher = baseline["higher_is_better"].get(task, {}).get(metric)
            error = f"{metric}_stderr,{filtered}"
            entry = {
                "task": task,
                "metric": metric,
                "filter": filtered,
                "higher_is_better": higher,
                "documents": values.get("sample_len"),
                "dense": {"value": value, "stderr": _number(values.get(error))},
            }
            if "sparse" in found:
                other = found["sparse"]["results"][task]
                entry["sparse"] = {"value": other[key], "stderr": _number(other.get(error))}
                entry["recovery"] = _recovery(value, other[key], higher)
                entry |= _paired(samples, task, metric, filtered)
            yield entry


def _recovery(baseline: float, sparse: float, higher_is_better: bool | None) -> float | None:
    over, under = (sparse, baseline) if higher_is_better else (baseline, sparse)
    return None if higher_is_better is None or not under else over / under


def _paired(samples: dict[str, Any], task: str, metric: str, filtered: str) -> dict[str, Any]:
    """Returns the mean difference by document with its standard error, where a document has one number."""
    sides = [
        [sample.get(metric) for sample in samples[side].get(task, []) if sample["filter"] == filtered]
        for side in ("dense", "sparse")
    ]
    pairs = list(zip(*sides, strict=True))
    if len(pairs) < 2 or not all(isinstance(value, int | float) for pair in pairs for value in pair):
        return {}
    differences = [sparse - baseline for baseline, sparse in pairs]
    return {
        "difference": statistics.fmean(differences),
        "difference_stderr": statistics.stdev(differences) / math.sqrt(len(pairs)),
        "documents_changed": sum(difference != 0 for difference in differences),
    }


def _check_same_requests(samples: dict[str, Any]) -> None:
    hashes = [
        {
            task: [
                (entry["doc_id"], entry["doc_hash"], entry["prompt_hash"], entry["target_hash"]) for entry in entries
            ]
            for task, entries in side.items()
        }
        for side in samples.values()
    ]
    assert all(one == hashes[0] for one in hashes), "both sides must be asked the same"


def _checkpoint_hash(model: PreTrainedModel) -> str | None:
    return checkpoint_sha256(Path(model.name_or_path)) if model.name_or_path else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _named(side: str, progress: Callable[[str, int, int], None] | None) -> Callable[[str, int, int], None] | None:
    return progress and (lambda task, done, total: progress(f"{side}, {task}", done, total))
