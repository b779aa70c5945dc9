"""How the native library is built: whole or not at all, by any compiler, for any machine, needing nothing but libc."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify.kernels import library
from sparsify.kernels.build import BuildError, build, find_compiler, library_path, main, not_built

# Half a minute less; what is tested here does not hang on the optimiser.
_QUICK = ("-O0",)
_ARM = "aarch64-linux-gnu-gcc"
_ARM_ROOT = Path("/usr/aarch64-linux-gnu")
Compiler = Callable[[str], str]


def _need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"no {program} here")
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_compiler()
    except BuildError as problem:
        pytest.skip(str(problem))
    return build(tmp_path_factory.mktemp("library") / library_path().name, extra=_QUICK)


@pytest.fixture
def own() -> Path:
    """The library of this installation, built as everyone's is."""
    if not library_path().is_file():
        pytest.skip("the native library is not built")
    return library_path()


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    """Makes a compiler of a shell script, which has the output in $out."""

    def make(script: str) -> str:
        path = tmp_path / "compiler"
        find_output = 'for word; do [ "$last" = -o ] && out=$word; last=$word; done\n'
        path.write_text(f"#!/bin/sh\n{find_output}{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_library_needs_libc_only(own: Path) -> None:
    done = subprocess.run([_need("readelf"), "-d", str(own)], capture_output=True, text=True, check=True)
    needed = [line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "(NEEDED)" in line]
    assert needed
    assert {name.split(".so")[0] for name in needed} <= {"libc", "libm", "libpthread", "ld-linux-x86-64"}


def test_library_asks_for_no_symbol_of_python_or_torch(own: Path) -> None:
    nm = [_need("nm"), "-D", "--undefined-only", str(own)]
    symbols = [line.split()[-1] for line in subprocess.run(nm, capture_output=True, text=True).stdout.splitlines()]
    assert any(symbol.startswith("pthread_create") for symbol in symbols)
    assert not [s for s in symbols if s.startswith(("Py", "_Py", "_Z", "GOMP", "omp_")) or "torch" in s]


def test_library_shows_its_interface_only(own: Path) -> None:
    nm = [_need("nm"), "-D", "--defined-only", str(own)]
    lines = subprocess.run(nm, capture_output=True, text=True).stdout.splitlines()
    names = {line.split()[-1] for line in lines}
    assert names >= set(library._SIGNATURES)
    assert all(name.startswith("sp_") for name in names)


def test_other_compilers_build_the_same(built: Path, tmp_path: Path) -> None:
    other = build(tmp_path / built.name, compiler=_need("clang"), extra=_QUICK)
    assert library.isas(library.open_library(other)) == library.isas(library.open_library(built))


def test_arm_library_computes_in_an_emulator(tmp_path: Path) -> None:
    compiler, emulator = _need(_ARM), _need("qemu-aarch64-static")
    if not _ARM_ROOT.is_dir():
        pytest.skip(f"no {_ARM_ROOT} here")
    made = build(tmp_path / "libsparsify_native.so", compiler=compiler, machine="aarch64", extra=_QUICK)
    assert int.from_bytes(made.read_bytes()[18:20], "little") == 183  # EM_AARCH64
    program = tmp_path / "check"
    source = Path(__file__).with_name("check_linear.c")
    link = [compiler, "-std=gnu11", "-O1", str(source), str(made), "-o", str(program), "-lm", f"-Wl,-rpath,{tmp_path}"]
    subprocess.run(link, check=True)
    done = subprocess.run([emulator, "-L", str(_ARM_ROOT), str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "neon\nportable\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("machine", "isas"),
    [
        ("x86_64", {"isa_portable", "isa_avx2", "isa_avx512"}),
        ("AMD64", {"isa_portable", "isa_avx2", "isa_avx512"}),
        ("arm64", {"isa_portable", "isa_neon"}),
        ("riscv64", {"isa_portable"}),
    ],
)
def test_files_and_flags_of_a_machine(tmp_path: Path, compiler: Compiler, machine: str, isas: set[str]) -> None:
    recorder = compiler(f'echo "$@" >> {tmp_path}/commands; echo > "$out"')
    build(tmp_path / "made.so", compiler=recorder, machine=machine)
    commands = (tmp_path / "commands").read_text()
    assert {
        word.split("/")[-1].removesuffix(".c") for word in commands.split() if "/isa_" in word and word.endswith(".c")
    } == isas
    # What is compiled for this processor alone would crash on another.
    assert "native " not in commands
    assert "-ffast-math" not in commands
    for line in commands.splitlines():
        assert ("-mavx" in line) == ("isa_avx" in line and " -c " in line)


def test_failed_build_leaves_what_was_there(tmp_path: Path, compiler: Compiler) -> None:
    output = tmp_path / "folder" / "made.so"
    output.parent.mkdir()
    output.write_bytes(b"before")
    script = 'case "$*" in *-shared*) echo half > "$out"; echo "ld: error: no room" >&2; exit 1;; esac; echo > "$out"'
    with pytest.raises(BuildError, match="failed: ld: error: no room"):
        build(output, compiler=compiler(script))
    assert [path.name for path in output.parent.iterdir()] == ["made.so"]
    assert output.read_bytes() == b"before"


def test_reason_is_the_first_error(compiler: Compiler) -> None:
    words = "In file included from x.c:1:\\nx.h:2:1: error: unknown type\\nnote: here"
    with pytest.raises(BuildError) as raised:
        build(Path("/nowhere/made.so"), compiler=compiler(f'printf "{words}\\n" >&2; exit 1'))
    line = not_built(raised.value)
    assert "failed: x.h:2:1: error: unknown type)" in line
    assert "python -m sparsify.kernels.build" in line
    assert "\n" not in line
    assert "note: here" in str(raised.value)


def test_program_that_cannot_be_run_is_a_build_error(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    with pytest.raises(BuildError, match="cannot be run"):
        build(tmp_path / "made.so", compiler=str(broken))


def test_folder_that_cannot_be_written_is_a_build_error(tmp_path: Path, compiler: Compiler) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="file cannot be written"):
        build(tmp_path / "file" / "made.so", compiler=compiler('echo > "$out"'))


def test_compiler_of_the_environment_may_have_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: Compiler
) -> None:
    program = compiler(f'echo "$1" >> {tmp_path}/first; echo > "$out"')
    monkeypatch.setenv("CC", f"{program} -flag")
    build(tmp_path / "made.so")
    assert set((tmp_path / "first").read_text().split()) == {"-flag"}


def test_no_compiler_is_one_line_and_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert main() == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: sparsify's CPU kernels were not built (no C compiler, CC=no-such-compiler")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(BuildError, match="neither cc, gcc nor clang"):
        find_compiler()
