"""One HTML file about a converted checkpoint, with its pictures as PNG and SVG beside it, from stored results only.

Not covered: measuring anything. What no result is stored of is named with the command that stores it.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sparsify
from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals.report_activations import activations_part
from sparsify.evals.report_bytes import bytes_part
from sparsify.evals.report_model import model_part
from sparsify.evals.report_page import Painter, Part, check_libraries, render_page
from sparsify.evals.report_quality import quality_part
from sparsify.evals.report_results import Results, Subject, read_results, read_subject
from sparsify.evals.report_speed import speed_part
from sparsify.evals.report_text import share

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written: the page, the pictures, and (what, command) for each result that is not stored."""

    page: Path
    pictures: tuple[Path, ...]
    missing: tuple[tuple[str, str], ...]


def write_report(checkpoint: Path, out: Path, results: Sequence[Path]) -> Report:
    """Writes the folder `out`: report.html and figures/; a report that stands there is replaced.

    Raises SparsifyError for results that are no results or another model's, or where `out` holds something else,
    CheckpointError for a folder that is no checkpoint, UnavailableError without jinja2 or matplotlib.
    """
    check_libraries()
    _check_out(out)
    subject = read_subject(checkpoint)
    found = read_results(subject, list(results))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as problem:
        raise UnavailableError(f"{out.parent} cannot be written: {problem.strerror}") from None
    try:
        figures = staging / "figures"
        figures.mkdir()
        painter = Painter(figures)
        parts = build_parts(subject, found, painter)
        (staging / PAGE).write_text(_page(subject, parts, found), encoding="utf-8")
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    pictures = tuple(out / path.relative_to(staging) for path in painter.written)
    return Report(out / PAGE, pictures, tuple(entry for part in parts for entry in part.missing))


def build_parts(subject: Subject, results: Results, painter: Painter) -> list[Part]:
    """Returns the sections of the page; their pictures are drawn."""
    return [
        model_part(subject, results),
        quality_part(subject, results, painter),
        speed_part(subject, results, painter),
        bytes_part(subject, results, painter),
        activations_part(subject, results, painter),
    ]


def _page(subject: Subject, parts: list[Part], results: Results) -> str:
    config = subject.config
    files = [stored.path.name for kind in results.by_kind.values() for stored in kind]
    footer = (
        f"Written by sparsify {sparsify.__version__} from the checkpoint's own files"
        f"{' and ' + ', '.join(files) if files else ''}. Nothing was measured to write it."
    )
    title = f"{subject.folder.resolve().name}: {config.method} at {share(config.sparsity)}"
    return render_page(title, f"An activation-sparse model made from {subject.source}.", parts, footer)


def _check_out(out: Path) -> None:
    """Only what a report is made of may be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise SparsifyError(f"--out {out} is a file; name a folder for the report")
    if out.is_dir() and (strange := sorted({path.name for path in out.iterdir()} - {PAGE, "figures"})):
        raise SparsifyError(
            f"--out {out} holds {strange[0]}, which is no part of a report: name a new folder; nothing was written"
        )


def _publish(staging: Path, out: Path) -> None:
    """Puts the finished folder in the place of the old one."""
    mask = os.umask(0)
    os.umask(mask)
    staging.chmod(0o777 & ~mask)
    if out.is_dir():
        shutil.rmtree(out)
    os.rename(staging, out)
