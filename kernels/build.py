"""Builds the native library from csrc/ with the machine's C compiler: `python -m sparsify.kernels.build`.

Each instruction set is a file of its own, compiled for it; which one runs is decided when the library is loaded, so a
wheel made anywhere runs on every machine of its architecture. setup.py loads this file by itself: standard library only.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
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
    """There is no compiler, or it failed; the message is what it said."""


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
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in sorted(_SOURCES.glob("*.c")):
            if source.stem in _ISA_FLAGS and source.stem not in chosen:
                continue
            target = Path(folder) / f"{source.stem}.o"
            flags = (*_FLAGS, *_NUMERICS, *_WARNINGS, *_ISA_FLAGS.get(source.stem, ()), *extra)
            _run([compiler, *flags, "-c", str(source), "-o", str(target)])
            objects.append(str(target))
        built = Path(folder) / output.name
        _run([compiler, "-shared", "-pthread", *extra, "-o", str(built), *objects, "-lm"])
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copy2(built, beside)
        beside.replace(output)
    return output


def find_compiler() -> str:
    """Returns the C compiler: $CC, else the first of cc, gcc and clang. Raises BuildError where there is none."""
    named = os.environ.get("CC")
    for name in (named,) if named else ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C compiler: {f'CC={named} is not a program' if named else 'cc, gcc and clang are missing'}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()}")


def main() -> int:
    try:
        path = build(library_path())
    except BuildError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 4
    print(f"built {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
