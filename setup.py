"""What pyproject.toml cannot say: the native library of kernels/csrc is compiled and goes into the wheel.

Where there is no C compiler, or it fails, the install goes on without the library and says so in one line;
SPARSIFY_REQUIRE_NATIVE=1 makes that an error. The library knows no Python: its wheel is py3-none-<platform>.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

_KERNELS = Path(__file__).resolve().parent / "kernels"


def _load_builder() -> Any:
    """Loads kernels/build.py by its path: the package around it is not installed yet."""
    spec = importlib.util.spec_from_file_location("sparsify_kernels_build", _KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_builder = _load_builder()
_INSTALLED = Path("sparsify", "kernels", _builder.library_path().name)


class BuildNative(Command):
    """Compiles the library into the folder that the wheel is made from, or beside its sources for an editable one."""

    description = "compile the native CPU kernels"
    user_options: list[tuple[str, str, str]] = []  # noqa: RUF012

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        target = _builder.library_path() if self.editable_mode else self._target()
        try:
            _builder.build(target)
        except _builder.BuildError as problem:
            # What is installed is never older than its sources: build/ may hold a library of another day.
            target.unlink(missing_ok=True)
            if os.environ.get("SPARSIFY_REQUIRE_NATIVE") == "1":
                raise CompileError(str(problem)) from None
            self.warn(_builder.not_built(problem))

    def get_outputs(self) -> list[str]:
        return [str(self._target())] if not self.editable_mode and self._target().is_file() else []

    def get_output_mapping(self) -> dict[str, str]:
        library = _builder.library_path()
        return {str(self._target()): str(library)} if self.editable_mode and library.is_file() else {}

    def _target(self) -> Path:
        assert self.build_lib is not None
        return Path(self.build_lib) / _INSTALLED


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of this platform where the library is in it, for every machine where it is not."""

    def get_tag(self) -> tuple[str, str, str]:
        assert self.bdist_dir is not None
        # Before, the library's place in the wheel was decided: the root, where the Python modules are.
        self.root_is_pure = not (Path(self.bdist_dir) / _INSTALLED).is_file()
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if not self.root_is_pure else (python, abi, platform)


build.sub_commands.append(("build_native", None))
setup(cmdclass={"build_native": BuildNative, "bdist_wheel": PlatformWheel})
