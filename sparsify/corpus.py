"""Text that every Python installation carries: the standard library's own source, in three disjoint parts.

Whole modules are held out by the fixed lists below, so that calibration and evaluation text never
meets the training text of the bundled `reference` model, and never each other. The text is read from
the running interpreter: nothing is downloaded or shipped. Other interpreters than the one that the
model was trained on (see its card) carry other versions of the same modules; the splits stay disjoint.

Not covered: text that a user brings, which is `sparsify.text`.
"""

import sysconfig
from pathlib import Path
from typing import Literal

# "library" is the part of "training" that is not tests.
Split = Literal["training", "library", "calibration", "evaluation"]

# Modules that exist from Python 3.11 on, of several subjects and styles in each list.
EVALUATION_MODULES = (
    "argparse.py",
    "ast.py",
    "csv.py",
    "difflib.py",
    "heapq.py",
    "http/client.py",
    "json/__init__.py",
    "json/decoder.py",
    "json/encoder.py",
    "json/scanner.py",
    "json/tool.py",
    "shutil.py",
    "statistics.py",
    "tarfile.py",
    "textwrap.py",
    "unittest/mock.py",
)
CALIBRATION_MODULES = (
    "calendar.py",
    "configparser.py",
    "dataclasses.py",
    "fractions.py",
    "ftplib.py",
    "imaplib.py",
    "logging/__init__.py",
    "logging/handlers.py",
    "optparse.py",
    "pprint.py",
    "sched.py",
    "smtplib.py",
    "subprocess.py",
)

_TEST_FOLDERS = {"test", "tests", "idle_test"}

# Not training text: installed packages, caches, tables of characters, and files that are broken on purpose.
_NOT_TRAINING_FOLDERS = (
    "site-packages/",
    "dist-packages/",
    "encodings/",
    "lib2to3/tests/data/",
    "test/encoded_modules/",
)


def standard_library_text(split: Split) -> list[str]:
    """Returns the sources of one split, one string a module, in a fixed order.

    Raises ValueError where the running interpreter carries no standard library sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    if split in ("training", "library"):
        paths = _training_paths(root)
        if split == "library":
            paths = [path for path in paths if not _TEST_FOLDERS.intersection(path.relative_to(root).parts)]
    else:
        names = CALIBRATION_MODULES if split == "calibration" else EVALUATION_MODULES
        paths = [root / name for name in names if (root / name).is_file()]
    texts = [text for path in paths if (text := _read_utf8(path))]
    if not texts:
        raise ValueError(
            f"no standard library sources for the {split} split under {root}: "
            "this interpreter was installed without them; give text of your own with --text FILE"
        )
    return texts


def _training_paths(root: Path) -> list[Path]:
    held_out = set(EVALUATION_MODULES) | set(CALIBRATION_MODULES)
    # A module's own tests quote its messages and its interface, so they are held out with it.
    subjects = {Path(name).parts[0].removesuffix(".py") for name in held_out}
    subjects |= {Path(name).stem for name in held_out if Path(name).stem != "__init__"}
    paths = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name in held_out or any(folder in name for folder in _NOT_TRAINING_FOLDERS):
            continue
        if name.startswith("test/") and any(
            part.removesuffix(".py").removeprefix("test_") in subjects for part in Path(name).parts
        ):
            continue
        paths.append(path)
    return paths


def _read_utf8(path: Path) -> str:
    """Returns the file's text, or "" where it is not UTF-8 (a few test files declare other encodings)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
