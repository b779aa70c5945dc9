"""Imports point one way, the packages listed are the folders there are, and importing sparsify costs nothing."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_LAYERS = ("kernels", "core", "evals", "cli")
# Leaves that every layer may use.
_SHARED = {"sparsify.errors"}
# Packages that only some layers may import, at all or when a module is imported.
_ONLY_IN = {"typer": {"cli"}, "rich": {"cli"}, "transformers": {"core", "evals", "cli"}}
# Modules with a subclass of such a package's class: they are imported themselves where they are used.
_SUBCLASSES = {"sparsify.evals.lm_eval_model": {"lm_eval"}}
_LAZY = {"pydantic", "lm_eval", "datasets", "matplotlib", "pandas", "huggingface_hub.inference"}


def _modules() -> dict[str, Path]:
    """Every module of the package by name; the links in sparsify/ are followed."""
    found = {}
    for folder, _, files in os.walk(_ROOT / "sparsify", followlinks=True):
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(_ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


_MODULES = _modules()


def _layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in _LAYERS else "core"


def _imports(path: Path, *, at_import_only: bool) -> Iterator[str]:
    """Yields what a file imports, as dotted names; `from a import b` yields a.b where that is a module of ours."""
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), at_import_only=at_import_only):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in _MODULES else str(node.module)


def _nodes(tree: ast.AST, *, at_import_only: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if at_import_only and lazy:
            continue
        yield node
        yield from _nodes(node, at_import_only=at_import_only)


@pytest.mark.parametrize("module", _MODULES)
def test_imports_point_down(module: str) -> None:
    own = _LAYERS.index(_layer(module))
    for name in _imports(_MODULES[module], at_import_only=False):
        top = name.split(".")[0]
        assert top not in ("kernels", "evals", "cli"), f"{module} imports {name}: write sparsify.{name}"
        if top == "sparsify" and name not in _SHARED:
            # Names in sparsify/__init__.py resolve to the core; the kernels are below it.
            assert _LAYERS.index(_layer(name)) <= own, f"{module} ({_layer(module)}) imports {name} above it"
        allowed = _ONLY_IN.get(top)
        assert allowed is None or _layer(module) in allowed, f"{module} imports {top}, which is for {allowed}"


@pytest.mark.parametrize("module", _MODULES)
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    names = set(_imports(_MODULES[module], at_import_only=True))
    assert not {name.split(".")[0] for name in names} & _LAZY - _SUBCLASSES.get(module, set())
    assert not any(name.startswith(tuple(_SUBCLASSES)) for name in names)


def test_no_module_needs_itself_to_be_imported() -> None:
    graph = {
        module: {name for name in _imports(path, at_import_only=True) if name in _MODULES and name != module}
        for module, path in _MODULES.items()
    }
    TopologicalSorter(graph).prepare()


def test_packages_listed_are_the_folders() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {str(path.parent.relative_to(_ROOT)).replace(os.sep, ".") for path in _MODULES.values()}
    # A folder of the design that has no module yet is still listed.
    linked = {f"sparsify.{name}" for name in ("kernels", "evals", "cli")}
    assert set(project["packages"]) == folders | linked
    assert project["package-dir"] == {name: name.removeprefix("sparsify.") for name in linked}


@pytest.mark.parametrize("folder", ["kernels", "evals", "cli", "tests"])
def test_linked_folders_are_no_top_level_packages(folder: str) -> None:
    assert not list((_ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("folder", ["kernels", "evals", "cli"])
def test_package_reaches_the_top_level_folder(folder: str) -> None:
    assert (_ROOT / "sparsify" / folder).resolve() == _ROOT / folder


def test_lazy_names_are_the_typed_ones() -> None:
    import sparsify

    tree = ast.parse((_ROOT / "sparsify" / "__init__.py").read_text(encoding="utf-8"))
    typed = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for imported in node.body:
                assert isinstance(imported, ast.ImportFrom)
                typed |= {alias.asname: imported.module for alias in imported.names}
    assert typed == sparsify._PUBLIC
    assert set(typed) <= set(dir(sparsify))


def test_every_public_name_resolves() -> None:
    import sparsify

    for name, module in sparsify._PUBLIC.items():
        assert not isinstance(getattr(sparsify, name), type(sparsify)), f"sparsify.{name} is a module"
        assert getattr(sparsify, name).__module__.startswith(module)
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = sparsify.convrt  # type: ignore[attr-defined]


def test_importing_sparsify_is_quick_and_touches_no_cuda() -> None:
    code = (
        "import sys, time; start = time.process_time(); import sparsify; took = time.process_time() - start\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'imports torch'\n"
        "assert took < 3, took\n"
        "for name in sparsify._PUBLIC: getattr(sparsify, name)\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
