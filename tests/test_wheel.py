"""The built wheel is the whole package, and works installed, away from the checkout; with a C compiler and without."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsify.kernels.build import BuildError, find_compiler

_NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "demo", "*.egg-info", "__pycache__", ".*_cache", "*.so"
)
_LIBRARY = "sparsify/kernels/libsparsify_native.so"


@dataclass(frozen=True)
class Bare:
    """What was built where there is no C compiler."""

    wheel: Path
    installed: Path
    log: str


@pytest.fixture(scope="module")
def sdist(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds from a copy, offline: a build/ folder of another day would hide a missing file."""
    tree, out = _copy(repository, tmp_path_factory), tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, check=True, capture_output=True)
    (built,) = out.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which is all that a package index has."""
    out = tmp_path_factory.mktemp("dist")
    done = _build(sdist, out, CC=_quick_compiler(tmp_path_factory.mktemp("compiler")))
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _install(wheel, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def bare(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Bare:
    """Built from a checkout in which libraries of another day lie around."""
    tree = _copy(repository, tmp_path_factory)
    for old in (tree / "kernels", tree / "build" / "lib" / "sparsify" / "kernels"):
        old.mkdir(parents=True, exist_ok=True)
        (old / Path(_LIBRARY).name).write_bytes(b"of another day")
    done = _build(tree, out := tmp_path_factory.mktemp("bare"), "-v", CC="/no/such/compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return Bare(built, _install(built, tmp_path_factory.mktemp("site")), done.stdout + done.stderr)


def _copy(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree") / "sparsify"
    shutil.copytree(repository, tree, symlinks=True, ignore=_NOT_SOURCE)
    return tree


def _build(source: Path, out: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir"]
    return subprocess.run(
        [*pip, *flags, "--wheel-dir", str(out), str(source)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def _install(wheel: Path, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True)
    return folder


def _quick_compiler(folder: Path) -> str:
    """Returns the machine's compiler without its optimiser, which takes half a minute; "" where there is none."""
    try:
        found = find_compiler()
    except BuildError:
        return ""
    script = folder / "cc"
    # The last of the flags holds.
    script.write_text(f'#!/bin/sh\nexec {found} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def _need_compiler() -> None:
    try:
        find_compiler()
    except BuildError as problem:
        pytest.skip(str(problem))


def _run(installed: Path, cwd: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(installed)} | environment,
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
        data = {
            "reference": (".json", ".safetensors", ".md"),
            "recipes": (".yaml",),
            "tasks": (".yaml",),
            "evals": (".j2",),
        }.get(relative.name, ())
        found |= {str(relative / name) for name in files if name.endswith((".py", *data))}
    return found | _c_sources(repository)


def _c_sources(repository: Path) -> set[str]:
    return {f"sparsify/kernels/csrc/{path.name}" for path in (repository / "kernels" / "csrc").glob("*.[ch]")}


def _contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_wheel_holds_every_module_the_library_and_nothing_else(repository: Path, wheel: Path) -> None:
    _need_compiler()
    assert _contents(wheel) == _source(repository) | {_LIBRARY}


def test_wheel_is_named_for_its_platform_and_no_python(wheel: Path) -> None:
    import sparsify

    _need_compiler()
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"sparsify_llm-{sparsify.__version__}-py3-none-{platform}.whl"
    about = zipfile.ZipFile(wheel).read(f"sparsify_llm-{sparsify.__version__}.dist-info/WHEEL").decode()
    assert "Root-Is-Purelib: false" in about


def test_library_of_the_wheel_is_used(installed: Path, tmp_path: Path) -> None:
    _need_compiler()
    code = (
        "import torch; from sparsify.kernels import dispatch, library\n"
        "assert library.missing() is None, library.missing()\n"
        "print(dispatch.select_backend(torch.device('cpu'), torch.bfloat16, 64, 64).name)\n"
    )
    assert _run(installed, tmp_path, "-c", code).stdout == "native\n"


def test_wheel_without_a_compiler_is_pure_and_says_so_in_one_line(repository: Path, bare: Bare) -> None:
    import sparsify

    assert bare.wheel.name == f"sparsify_llm-{sparsify.__version__}-py3-none-any.whl"
    assert _contents(bare.wheel) == _source(repository)
    (line,) = [line for line in bare.log.splitlines() if "CPU kernels were not built" in line]
    assert "CC=/no/such/compiler is not a program" in line
    assert "python -m sparsify.kernels.build" in line


def test_package_without_the_library_runs_the_reference_and_says_so_once(bare: Bare, tmp_path: Path) -> None:
    code = (
        "import torch; from sparsify.kernels import dispatch, library\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16):\n"
        "    print(dispatch.select_backend(torch.device('cpu'), dtype, 64, 64).name)\n"
        "print(library.missing())\n"
    )
    done = _run(bare.installed, tmp_path, "-c", code)
    *names, missing = done.stdout.splitlines()
    assert names == ["reference"] * 3
    assert "not built" in missing
    assert done.stderr.splitlines() == [missing]


def test_library_can_be_built_in_an_installed_package(bare: Bare, tmp_path: Path) -> None:
    _need_compiler()
    folder = tmp_path / "site"
    shutil.copytree(bare.installed, folder)
    done = _run(folder, tmp_path, "-m", "sparsify.kernels.build", CC=_quick_compiler(tmp_path))
    assert done.stdout == f"built {folder / _LIBRARY}\n"
    code = "from sparsify.kernels import library; assert library.missing() is None, library.missing()"
    _run(folder, tmp_path, "-c", code)


def test_required_library_that_cannot_be_built_is_an_error(sdist: Path, tmp_path: Path) -> None:
    done = _build(sdist, tmp_path, CC="/no/such/compiler", SPARSIFY_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "CC=/no/such/compiler is not a program" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_sdist_holds_the_sources_and_no_library(repository: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {name.removeprefix("sparsify/") for name in _c_sources(repository)}
    assert names >= {"setup.py", "pyproject.toml", "kernels/build.py"}
    assert not [name for name in names if name.endswith(".so")]


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
