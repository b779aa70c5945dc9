"""lm-eval's tasks by name: suites, tasks of one's own, local data files, and one clear error for what is not there.

A task's data come from the hub, from the files that its own YAML names, or from a folder with TASK/SPLIT.jsonl, in
which case lm-eval's own definition of the task is used with only the source of its data replaced.
"""

import difflib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sparsify.errors import SparsifyError, UnavailableError
from sparsify.hub import hub_problem

INSTALL = "pip install 'sparsify-llm[eval]'"


SUITES = {
    # arXiv 2504.19449: eight common-sense tasks, summarization (XSum) and language modelling (WikiText-2).
    "rsparse-suite": (
        "winogrande", "piqa", "sciq", "openbookqa", "hellaswag", "boolq", "arc_easy", "arc_challenge", "xsum_rouge",
        "wikitext",
    )
}  # fmt: skip
# What lm-eval does not have, or only through another package: its own xsum needs unitxt.
_OWN_TASKS = Path(__file__).parent / "tasks"
# Tasks that read the same data may share a folder of this name.
_FOLDERS = {"truthfulqa_mc1": "truthfulqa_mc", "truthfulqa_mc2": "truthfulqa_mc"}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
# Builders of the datasets package that read files which the task names itself.
_FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow", "imagefolder", "audiofolder")


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks: what lm-eval takes as `tasks` and `task_manager`, and every single task by name."""

    specs: list[Any]
    manager: Any
    by_name: dict[str, Any]


@contextmanager
def load_tasks(
    names: Sequence[str], *, include_path: Path | None = None, data: Path | None = None, num_fewshot: int | None = None
) -> Iterator[Tasks]:
    """Loads tasks, groups, tags and suites by name with their data; inside, the data are there.

    include_path: a folder with task files of one's own. data: a folder with TASK/SPLIT.jsonl for every task that
    does not name its own files. Raises SparsifyError for an unknown task, a missing file or few-shot examples that
    there are no data for, UnavailableError without lm-eval, without a package that a task needs, or without the hub.
    """
    check_installed()
    for flag, folder in (("--include-path", include_path), ("--task-data", data)):
        if folder is not None and not folder.is_dir():
            raise SparsifyError(f"{flag} {folder} is not a folder")
    wanted = _expand(names)
    manager = _manager(wanted, include_path)
    index: dict[str, Any] = manager.task_index
    for name in wanted:
        if name not in index:
            raise SparsifyError(f"lm-eval has no task {name!r}.{_nearest(name, [*SUITES, *index])}")
    leaves = list(dict.fromkeys(leaf for name in wanted for leaf in _leaves(name, index)))
    remote = [leaf for leaf in leaves if (index[leaf].cfg or {}).get("dataset_path") not in _FILE_BUILDERS]
    with tempfile.TemporaryDirectory(prefix="sparsify-tasks-") as scratch:
        if data is not None:
            for leaf in remote:
                index[leaf] = _with_local_data(index[leaf], data, Path(scratch), num_fewshot)
        elif remote and (problem := hub_problem()):
            raise UnavailableError(
                f"the data of {remote[0]} are on the hub, which is unreachable ({problem}). {_ADVICE}"
            )
        loaded = _load(manager, wanted)
        _check(loaded["tasks"])
        inside = {child for children in loaded.get("group_map", {}).values() for child in children}
        found = loaded.get("groups", {}) | loaded["tasks"]
        specs = [item for name, item in found.items() if name not in inside]
        yield Tasks(specs, manager, loaded["tasks"])


def check_installed() -> None:
    """Raises UnavailableError where lm-eval or datasets is not installed."""
    for name in ("lm_eval", "datasets"):
        if importlib.util.find_spec(name) is None:
            raise UnavailableError(f"--tasks needs {name}, which is not installed: {INSTALL}")


def split_of(task: Any) -> str:
    """Returns the name of the split whose documents a task scores."""
    return str(task.config.test_split if task.has_test_docs() else task.config.validation_split)


def _expand(names: Sequence[str]) -> list[str]:
    wanted = [task for name in names for task in SUITES.get(name, (name,))]
    if not all(wanted) or not wanted:
        raise SparsifyError("--tasks takes names with commas between, such as hellaswag,arc_easy")
    return list(dict.fromkeys(wanted))


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [str(_OWN_TASKS), *([] if include_path is None else [str(include_path)])]
    # Reading lm-eval's own 14,000 definitions takes ten seconds: not where nobody asks for one.
    own = TaskManager(include_path=folders, include_defaults=False)
    if all(_is_complete(name, own.task_index) for name in names):
        return own
    return TaskManager(include_path=folders)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" Did you mean {', '.join(near)}?" if near else " `lm_eval ls tasks` lists all"


def _is_complete(name: str, index: dict[str, Any]) -> bool:
    """Whether the index holds a task, group or tag and all that is below it."""
    return name in index and all(_is_complete(child, index) for child in _children(index[name]))


def _leaves(name: str, index: dict[str, Any]) -> Iterator[str]:
    """Yields the single tasks below a task, group or tag that the index knows."""
    if name in index:
        children = _children(index[name])
        if not children:
            yield name
        for child in children:
            yield from _leaves(child, index)


def _children(entry: Any) -> list[str]:
    """Returns the names below a group or tag; none of a single task."""
    return sorted(entry.tags) if entry.kind.name == "TAG" else _named((entry.cfg or {}).get("task"))


def _named(members: Any) -> list[str]:
    """Returns the names in a group's list of members, also of groups that are written out in it."""
    names: list[str] = []
    for member in members if isinstance(members, list) else []:
        inside = member if isinstance(member, str) else member.get("task", member.get("group"))
        names += [inside] if isinstance(inside, str) else _named(inside)
    return names


def _with_local_data(entry: Any, data: Path, scratch: Path, num_fewshot: int | None) -> Any:
    """Returns the index entry with its data read from TASK/SPLIT.jsonl; splits without a file are switched off."""
    config = entry.cfg or {}
    if entry.kind.name == "PY_TASK" or config.get("custom_dataset") is not None:
        raise SparsifyError(f"task {entry.name} loads its data in Python: --task-data cannot replace them")
    folders = [data / entry.name, data / _FOLDERS.get(entry.name, entry.name)]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    named = {key: str(config[key]) for key in _SPLITS if config.get(key)}
    files = {split: folder / f"{split}.jsonl" for split in named.values()}
    there = {split: str(path.resolve()) for split, path in files.items() if path.is_file()}
    scored = [named[key] for key in ("test_split", "validation_split") if key in named]
    if not any(split in there for split in scored):
        raise SparsifyError(
            f"no data for task {entry.name}: --task-data needs {' or '.join(str(files[split]) for split in scored)}"
        )
    kept = {key for key, split in named.items() if split in there}
    shots = num_fewshot if num_fewshot is not None else config.get("num_fewshot")
    if shots and not (kept & {"training_split", "fewshot_split"} or {"validation_split", "test_split"} <= kept):
        raise SparsifyError(
            f"task {entry.name} has no data for {shots} few-shot examples but the documents that it scores: "
            f"put its {named.get('training_split', 'train')}.jsonl into {folder}, or use --num-fewshot 0"
        )
    override = {
        "include": str(entry.yaml_path),
        "task": entry.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": there, "cache_dir": str(scratch / "cache")},
        **{key: named[key] if key in kept else None for key in _SPLITS if key in named},
    }
    path = scratch / f"{entry.name}.yaml"
    path.write_text(yaml.safe_dump(override), encoding="utf-8")
    return replace(entry, yaml_path=path)


def _load(manager: Any, names: list[str]) -> Any:
    import datasets
    import jinja2

    bad = (ValueError, TypeError, LookupError, AttributeError, datasets.exceptions.DatasetsError, jinja2.TemplateError)
    try:
        return manager.load(names)
    except ImportError as problem:
        raise UnavailableError(f"a task of {', '.join(names)} needs a package that is not here: {problem}") from problem
    except OSError as problem:
        raise UnavailableError(f"the data of {', '.join(names)} cannot be loaded: {problem}. {_ADVICE}") from problem
    except bad as problem:
        raise SparsifyError(
            f"{', '.join(names)} cannot be loaded ({type(problem).__name__}: {problem}): check the data's fields and "
            "the task's file; name one task at a time"
        ) from problem


def _check(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise SparsifyError(
                f"task {name} runs code that the model wrote: `sparsify exec -- lm_eval --model sparsify ... "
                "--confirm_run_unsafe_code` does that"
            )
        if getattr(task, "MULTIMODAL", False):
            raise SparsifyError(f"task {name} is not of text alone: choose another")


_ADVICE = (
    "With a copy in the cache set HF_HUB_OFFLINE=1; or give a folder with TASK/SPLIT.jsonl as --task-data, or your own "
    "task files as --include-path"
)
