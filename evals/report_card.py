"""The key numbers of stored results, put into the checkpoint's model card with the commands that measure them again."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsify.card import with_results
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.evals.report_results import Results, Stored, read_results, read_subject
from sparsify.evals.report_text import perplexity, share, size, task_score
from sparsify.manifest import CARD, replace_card

_Line = tuple[str, str]
_KINDS = ("perplexity", "tasks", "speed", "ppl-p")


def write_card(folder: Path, paths: Sequence[Path]) -> Path:
    """Writes the results into the folder's README.md, and its hash into the manifest; returns the card's path.

    Raises SparsifyError without a result that has key numbers, CheckpointError where the card or manifest is missing.
    """
    subject = read_subject(folder)
    results = read_results(subject, list(paths))
    lines, commands = key_numbers(results, subject.source)
    if not lines:
        raise SparsifyError(
            "--card puts key numbers of results into the card: give --results of `sparsify eval`, `bench` or `measure`"
        )
    card = folder / CARD
    if not card.is_file():
        raise CheckpointError(f"{folder} has no {CARD}: see `sparsify verify {folder}`")
    return replace_card(folder, with_results(card.read_text(encoding="utf-8"), lines, commands))


def key_numbers(results: Results, source: str) -> tuple[list[_Line], list[str]]:
    """Returns (what, value) of every result, and the commands; the checkpoint is called FOLDER in them."""
    lines: list[_Line] = []
    commands: list[str] = []
    for kind in _KINDS:
        for stored in results.of(kind):
            with stored.reading():
                for line, command in _numbers(stored, source):
                    lines.append(line)
                    commands.append(command)
    return lines, list(dict.fromkeys(commands))


def _numbers(stored: Stored, source: str) -> Iterator[tuple[_Line, str]]:
    data = stored.data
    if stored.kind == "perplexity":
        yield from (_perplexity(entry) for entry in data["models"])
    elif stored.kind == "tasks":
        for entry in data["models"]:
            yield from _tasks(entry)
    elif stored.kind == "speed":
        yield from _speed(data)
    else:
        yield from _ppl_p(data, source)


def _perplexity(entry: dict[str, Any]) -> tuple[_Line, str]:
    about = entry["dense"]
    where = f"{about['text']}, {about['windows']} × {about['seq_len']} tokens, {about['protocol']}"
    value = f"dense {perplexity(about['perplexity'])}"
    if "sparse" in entry:
        value += (
            f", sparse {perplexity(entry['sparse']['perplexity'])}, realised sparsity "
            f"{share(entry['realised_sparsity'])}, {size(entry['touched_bytes_per_token'])} a token"
        )
    command = (
        f"sparsify eval FOLDER --text {about['text']} --seq-len {about['seq_len']} --stride {about['stride']} "
        f"--limit {about['windows']} --protocol {about['protocol']}"
    )
    return (f"perplexity, {where}", value), command


def _tasks(entry: dict[str, Any]) -> Iterator[tuple[_Line, str]]:
    limit = "" if entry["limit"] is None else f" --limit {entry['limit']}"
    names = ",".join(entry["tasks"])
    command = f"sparsify eval FOLDER --tasks {names}{limit} --protocol {entry['protocol']}"
    for score in entry["scores"]:
        if "sparse" not in score:
            continue
        dense, sparse = task_score(score["dense"]), task_score(score["sparse"])
        value = f"dense {dense}, sparse {sparse}, recovery {share(score['recovery'])}"
        documents = f", {score['documents']:,} documents" if score["documents"] else ""
        yield (f"{score['task']}, {score['metric']}, {entry['protocol']}{documents}", value), command


def _speed(data: dict[str, Any]) -> Iterator[tuple[_Line, str]]:
    command = (
        f"sparsify bench FOLDER --prompt-tokens {data['prompt_tokens']} --new-tokens {data['new_tokens']} --rounds "
        f"{data['rounds']} --batch-size {data['batch']}"
    )
    best = data["best_dense"]
    for name, side in data["sides"].items():
        if side["sparse"]:
            ratio = data["ratios"][name][best]
            value = (
                f"{side['ms_per_step']['median']:.2f} ms, {ratio['median']:.2f}× the fastest dense side, {best} "
                f"({ratio['p10']:.2f} to {ratio['p90']:.2f})"
            )
            threads = f"{data['threads']} thread{'s' if data['threads'] > 1 else ''}"
            what = f"a decoded step, batch {data['batch']}, {data['device']}, {data['cpu']}, {threads}"
            if side["fits_in_cache"]:
                what += "; the weights fit in the cache"
            yield (what, value), command


def _ppl_p(data: dict[str, Any], source: str) -> Iterator[tuple[_Line, str]]:
    settings = data["settings"]
    points = [point for point in data["points"] if point["p"] is not None]
    tolerances = ",".join(dict.fromkeys(f"{100 * point['p']:g}%" for point in points))
    rules = ",".join(dict.fromkeys(point["rule"] for point in points))
    command = (
        f"sparsify measure {Path(source).name} --ppl-p {tolerances} --rule {rules} --scope {data['scope']} --text "
        f"{data['dense']['text']} --seq-len {settings['seq_len']} --limit {settings['limit']}"
    )
    for point in points:
        what = f"{data['metric']} of the dense model, p = {100 * point['p']:g}%, rule {point['rule']}"
        yield (what, share(point["sparsity"], 2)), command
