"""The C kernels without Python: under address, undefined and thread sanitizers, and on ARM in an emulator.

native_driver.c compares every function of the library with plain loops in double and exits with 1 where they differ.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from sparsify.kernels import library
from sparsify.kernels.build import BuildError, build, find_compiler, library_path

_HERE = Path(__file__).parent
_ARM, _EMULATOR, _ARM_ROOT = "aarch64-linux-gnu-gcc", "qemu-aarch64-static", Path("/usr/aarch64-linux-gnu")

_MEMORY = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-g", "-O0")
_THREADS = ("-fsanitize=thread", "-g", "-O0")
# One that is right, and one with the fault that the sanitizer is for.
_RIGHT = "int main(void) { return 0; }"
_OVERFLOW = (
    "#include <stdlib.h>\nint main(int n, char **a) { (void)a; char *p = malloc(n); p[n] = 1; return p[n] - 1; }"
)
_RACE = """#include <pthread.h>
static int number;
static void *add(void *unused) { for (int i = 0; i < 1000; i++) number++; return unused; }
int main(void) { pthread_t t; pthread_create(&t, 0, add, 0); add(0); return pthread_join(t, 0); }
"""


def compiled(
    sources: list[Path], output: Path, flags: tuple[str, ...] = (), compiler: str | None = None
) -> subprocess.CompletedProcess[str]:
    headers = library_path().parent / "csrc"
    command = [*shlex.split(compiler or find_compiler()), "-std=c11", "-D_GNU_SOURCE", "-O1", *flags, f"-I{headers}"]
    command += [*map(str, sources), "-o", str(output), f"-Wl,-rpath,{sources[-1].parent}", "-lm", "-pthread"]
    return subprocess.run(command, capture_output=True, text=True)


def driver(built: Path, output: Path, flags: tuple[str, ...] = (), compiler: str | None = None) -> Path:
    """The driver, linked to a library."""
    warnings = ("-Wall", "-Wextra", "-Werror")
    done = compiled([_HERE / "native_driver.c", built], output, (*flags, *warnings), compiler)
    assert done.returncode == 0, done.stderr
    return output


def assert_passes(*command: str, isas: list[str]) -> None:
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} passed" for name in (*isas, "threads")]


def need_sanitizer(folder: Path, flags: tuple[str, ...], fault: str) -> None:
    """Skips where there is no compiler, no such sanitizer, or one that does not work here."""
    try:
        find_compiler()
    except BuildError as problem:
        pytest.skip(str(problem))
    for source, expected in ((_RIGHT, True), (fault, False)):
        path = folder / "probe.c"
        path.write_text(source)
        done = compiled([path], folder / "probe", flags)
        if done.returncode:
            pytest.skip(f"the compiler has no {flags[0]}: {done.stderr.strip().splitlines()[-1]}")
        ran = subprocess.run([folder / "probe"], capture_output=True, text=True)
        if (ran.returncode == 0) != expected:
            pytest.skip(f"{flags[0]} does not work here: {(ran.stderr.strip() or 'it finds no fault').splitlines()[0]}")


def test_the_library_as_it_is_installed(tmp_path: Path) -> None:
    if (loaded := library.load()) is None:
        pytest.skip(str(library.missing()))
    try:
        find_compiler()
    except BuildError as problem:
        pytest.skip(str(problem))
    assert_passes(str(driver(library_path(), tmp_path / "driver")), isas=library.isas(loaded))


@pytest.mark.slow
def test_no_access_outside_memory_and_nothing_undefined(tmp_path: Path) -> None:
    need_sanitizer(tmp_path, _MEMORY, _OVERFLOW)
    built = build(tmp_path / "library.so", extra=_MEMORY)
    # Not loaded into this process: an address sanitizer wants to be there first.
    isas = library.isas(library.load()) if library.load() is not None else ["portable"]
    assert_passes(str(driver(built, tmp_path / "driver", _MEMORY)), *isas, isas=isas)


@pytest.mark.slow
def test_no_races(tmp_path: Path) -> None:
    """One instruction set: what threads share does not depend on it."""
    need_sanitizer(tmp_path, _THREADS, _RACE)
    built = build(tmp_path / "library.so", extra=_THREADS)
    assert_passes(str(driver(built, tmp_path / "driver", _THREADS)), "portable", isas=["portable"])


@pytest.mark.slow
def test_arm_in_an_emulator(tmp_path: Path) -> None:
    for program in (_ARM, _EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here")
    if not _ARM_ROOT.is_dir():
        pytest.skip(f"no {_ARM_ROOT} here")
    built = build(tmp_path / "library.so", compiler=_ARM, machine="aarch64", extra=("-O1",))
    program = str(driver(built, tmp_path / "driver", compiler=_ARM))
    assert_passes(_EMULATOR, "-L", str(_ARM_ROOT), program, isas=["neon", "portable"])
