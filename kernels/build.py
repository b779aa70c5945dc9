"""Builds the native library from csrc/ with the machine's C compiler: `python -m sparsify.kernels.build`.

Each instruction set is a file of its own, compiled for it; which one runs is decided when the library is loaded, so a
wheel made anywhere runs on every machine of its architecture. setup.py loads this file by itself, so that it needs the
standard library only.
"""

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SOURCES = Path(__file__).resolve().parent / "csrc"
_FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread")
# Products and sums are fused only where the kernels say so, and errno is nobody's business.
_NUMERICS = ("-ffp-contract=off", "-fno-math-errno")
_WARNINGS = ("-Wall", "-Wextra")
_ISA_FLAGS = {
    "isa_portable": (),
    "isa_avx2": ("-mavx2", "-mfma", "-mf16c"),
    "isa_avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "isa_neon": (),
}
_ISAS = {
    "x86_64": ("isa_portable", "isa_avx2", "isa_avx512"),
    "amd64": ("isa_portable", "isa_avx2", "isa_avx512"),
    "aarch64": ("isa_portable", "isa_neon"),
    "arm64": ("isa_portable", "isa_neon"),
}


class BuildError(RuntimeError):
    """There is no compiler, or it failed: the first line of the message is why, the rest what the compiler said."""


def library_path() -> Path:
    """Returns where the library of this installation is, or would be."""
    return Path(__file__).resolve().parent / "libsparsify_native.so"


def build(
    output: Path, *, compiler: str | None = None, machine: str | None = None, extra: tuple[str, ...] = ()
) -> Path:
    """Compiles csrc/ into the shared library `output`, which appears whole or not at all, and returns its path.

    machine: the architecture to build for, this one's where None; extra: more flags, such as a sanitizer's.
    Raises BuildError.
    """
    if sys.platform == "win32":
        raise BuildError("the native kernels need POSIX threads: they are not built on Windows")
    compiler = compiler or find_compiler()
    machine = (machine or platform.machine()).lower()
    chosen = _ISAS.get(machine, ("isa_portable",))
    sources = [s for s in sorted(_SOURCES.glob("*.c")) if s.stem not in _ISA_FLAGS or s.stem in chosen]
    if not sources:
        raise BuildError(f"there are no C sources in {_SOURCES}")
    with tempfile.TemporaryDirectory() as folder:
        commands, objects = [], []
        for source in sources:
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            flags = (*_FLAGS, *_NUMERICS, *_WARNINGS, *_ISA_FLAGS.get(source.stem, ()), *extra)
            commands.append([*shlex.split(compiler), *flags, "-c", str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        built = Path(folder) / output.name
        _run([*shlex.split(compiler), "-shared", "-pthread", *extra, "-o", str(built), *objects, "-lm"])
        _put(built, output)
    return output


def find_compiler() -> str:
    """Returns the C compiler: $CC, which may have flags, else the first of cc, gcc and clang. Raises BuildError."""
    named = os.environ.get("CC", "").strip()
    for name in (named,) if named else ("cc", "gcc", "clang"):
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(f"no C compiler, {f'CC={named} is not a program' if named else 'neither cc, gcc nor clang'}")


def not_built(problem: BuildError) -> str:
    """Returns in one line that there are no CPU kernels, why, and how to get them."""
    return (
        f"sparsify's CPU kernels were not built ({str(problem).splitlines()[0]}): it works without them, slower. "
        "With a C compiler (Debian: apt install gcc), `python -m sparsify.kernels.build` makes them"
    )


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as problem:
        raise BuildError(f"{command[0]} cannot be run: {problem}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise BuildError("\n".join((f"{command[0]} failed: {first.strip()}", shlex.join(command), *lines)))


def _put(built: Path, output: Path) -> None:
    """Copies a file to its place under another name, then renames it: a kill leaves the old file or the new one."""
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, beside)
        beside.replace(output)
    except OSError as problem:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise BuildError(f"{output.parent} cannot be written: {problem}") from None


def main() -> int:
    """Builds the library of this installation; returns the exit status. What stood there stays where that fails."""
    try:
        path = build(library_path())
    except BuildError as problem:
        for line in (*str(problem).splitlines()[1:], f"error: {not_built(problem)}"):
            print(line, file=sys.stderr)
        return 4
    print(f"built {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
