"""The part of `sparsify eval` that runs lm-eval tasks: dense and sparse on the same requests, one table a model."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from sparsify.cli.loading import load
from sparsify.cli.output import Output, make_table, percent
from sparsify.cli.placement import Placement
from sparsify.cli.progress import Progress


@dataclass(frozen=True)
class TaskFlags:
    """The flags that only tasks have."""

    num_fewshot: int | None = None
    include_path: Path | None = None
    task_data: Path | None = None
    log_samples: bool = False

    def given(self) -> dict[str, object]:
        """Returns the values by the flag's spelling."""
        return {f"--{name.replace('_', '-')}": value for name, value in vars(self).items()}


def evaluate_tasks(
    models: list[str],
    names: list[str],
    flags: TaskFlags,
    output: Output,
    *,
    only_dense: bool,
    protocol: str,
    limit: int | None,
    batch_size: int,
    dtype: str,
    placement: Placement,
    backend: str | None,
    trust_remote_code: bool,
) -> None:
    """Loads the tasks once, runs them on each model and emits the result."""
    with output.working(), Progress() as progress:
        from sparsify.evals.lm_eval_run import check_settings, run_tasks
        from sparsify.evals.lm_eval_tasks import check_installed, load_tasks

        check_settings(limit=limit, num_fewshot=flags.num_fewshot, batch_size=batch_size)
        check_installed()
        import datasets

        # What they say on each run (a model that is no string, a default that a flag replaces) is no news here.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        progress.note(f"loading tasks: {', '.join(names)}")
        results = []
        with load_tasks(
            names, include_path=flags.include_path, data=flags.task_data, num_fewshot=flags.num_fewshot
        ) as tasks:
            for spec in models:
                loaded = load(
                    spec, progress, dtype=dtype, placement=placement, backend=backend,
                    trust_remote_code=trust_remote_code,
                )  # fmt: skip
                stage = partial(_report, progress, Path(spec).name)
                measured = run_tasks(
                    loaded.model, loaded.tokenizer, tasks,
                    protocol=protocol, limit=limit, num_fewshot=flags.num_fewshot, batch_size=batch_size,
                    only_dense=only_dense, log_samples=flags.log_samples,
                    progress=stage,
                )  # fmt: skip
                results.append({"model": spec, "converted": loaded.converted} | measured)
                del loaded
    result = {"protocol": protocol, "models": results}
    output.emit(result, lambda console: _render(console, result))


def _report(progress: Progress, model: str, stage: str, done: int, total: int) -> None:
    progress(f"{model}, {stage}", done, total)


def _render(console: Console, result: dict[str, Any]) -> None:
    from sparsify.evals.report_text import task_score

    for entry in result["models"]:
        table = make_table(escape(entry["model"]), "task", "metric", "dense", "sparse", "recovery", "n", left=2)
        # Names of tasks are long: room for them in 80 columns.
        table.padding = (0, 1, 0, 0)
        table.columns[1].no_wrap = True
        last = None
        for score in entry["scores"]:
            table.add_row(
                "" if score["task"] == last else escape(score["task"]),
                escape(score["metric"] if score["filter"] == "none" else f"{score['metric']}, {score['filter']}"),
                task_score(score["dense"]),
                task_score(score.get("sparse")),
                percent(score.get("recovery")),
                str(score["documents"] or "-"),
            )
            last = score["task"]
        console.print(table)
        for line in _notes(entry):
            console.print(line, markup=False)


def _notes(entry: dict[str, Any]) -> list[str]:
    tasks = entry["tasks"]
    lines = [f"Protocol {entry['protocol']}: {entry['statement']}."]
    shares = {name: task["realised_sparsity"] for name, task in tasks.items() if "realised_sparsity" in task}
    if shares:
        said = ", ".join(f"{name} {percent(share)}" for name, share in shares.items())
        lines.append(f"Realised sparsity: {said}.")
    shots = sorted({task["num_fewshot"] for task in tasks.values()})
    cut = sum(task["truncated_requests"] for task in tasks.values())
    limit = entry["limit"]
    lines.append(
        f"{' and '.join(map(str, shots))} few-shot examples, {entry['dtype']}, batch size {entry['batch_size']}, no "
        f"padding, {'all documents' if limit is None else f'the first {limit} documents of a task'}; "
        f"± is lm-eval's standard error, of lm-eval {entry['environment']['packages']['lm_eval']}."
    )
    if cut:
        lines.append(f"{cut} requests are longer than the model's context and lost tokens on the left.")
    return lines
