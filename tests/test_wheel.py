"""The built wheel is the whole package, and works installed, away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_NOT_SOURCE = shutil.ignore_patterns(".git", ".venv", "build", "dist", "demo", "*.egg-info", "__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds from a copy, offline: a build/ folder of another day would hide a missing file."""
    tree = tmp_path_factory.mktemp("tree") / "sparsify"
    shutil.copytree(repository, tree, symlinks=True, ignore=_NOT_SOURCE)
    out = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", str(out), str(tree)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True)
    return folder


def _run(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _source(repository: Path) -> set[str]:
    """Every module and data file that the wheel has to carry, as paths in it."""
    found = {"sparsify_autoload.py"}
    for folder, _, files in os.walk(repository / "sparsify", followlinks=True):
        relative = Path(folder).relative_to(repository)
        data = (".json", ".safetensors", ".md") if relative.name == "reference" else ()
        found |= {str(relative / name) for name in files if name.endswith((".py", *data))}
    return found


def test_wheel_holds_every_module_and_nothing_else(repository: Path, wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == _source(repository)


def test_wheel_is_named_and_carries_the_version(wheel: Path) -> None:
    import sparsify

    assert wheel.name == f"sparsify_llm-{sparsify.__version__}-py3-none-any.whl"


def test_every_module_imports_from_the_installed_wheel(repository: Path, installed: Path, tmp_path: Path) -> None:
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in _source(repository)
        if name.endswith(".py")
    )
    code = (
        "import importlib, os, torch\n"
        f"for name in {modules}:\n"
        "    file = importlib.import_module(name).__file__\n"
        f"    assert os.path.realpath(file).startswith({str(installed.resolve())!r}), file\n"
        "assert not torch.cuda.is_initialized()\n"
        "print('all')\n"
    )
    assert _run(installed, tmp_path, "-c", code).stdout == "all\n"


def test_commands_work_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    help_text = _run(installed, tmp_path, "-m", "sparsify.cli.main", "--help").stdout
    for command in ("convert", "eval", "generate", "bench", "inspect", "verify", "methods", "doctor", "exec"):
        assert command in help_text


def test_reference_model_comes_with_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "from sparsify.models import resolve_model; from pathlib import Path\n"
        "folder = Path(resolve_model('reference')); print(folder)\n"
        "assert (folder / 'model.safetensors').stat().st_size > 0\n"
    )
    assert _run(installed, tmp_path, "-c", code).stdout.startswith(str(installed.resolve()))
