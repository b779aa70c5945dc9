"""`sparsify exec`: other Python programs, with sparsify registered, and their exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.cli.exec import resolve
from sparsify.errors import SparsifyError


def _exec(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `sparsify exec` where the entry point is off."""
    return subprocess.run(
        [sys.executable, "-m", "sparsify.cli.main", "exec", *command],
        env=os.environ | {"SPARSIFY_AUTOLOAD": "0"},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["lm_evla"], "no command 'lm_evla'"),
        (["pytst"], "Did you mean 'pytest'?"),
        (["ls", "-l"], "is not a Python program"),
        (["python"], "cannot run in this process"),
        (["python", "-V"], "`python -V` cannot run in this process"),
        (["python", "-m"], "needs a module"),
        (["python3", "-c"], "needs a program"),
        (["python", "not_here.py"], "no script 'not_here.py'"),
        (["not_here.py"], "no script 'not_here.py'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_what_it_cannot_run(command: list[str], problem: str) -> None:
    with pytest.raises(SparsifyError, match=problem.replace("?", r"\?")):
        resolve(command)


def test_refusal_is_one_line_and_exit_code_2() -> None:
    done = _exec("--", "python", "-m", "not_here")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No module named not_here" in done.stderr


def test_script_sees_its_own_folder_arguments_and_registration(tmp_path: Path) -> None:
    folder = tmp_path / "tool"
    folder.mkdir()
    (folder / "neighbour.py").write_text("value = 'found'\n")
    (folder / "script.py").write_text(
        "import sys, neighbour, sparsify\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "if __name__ == '__main__':\n"
        "    print(neighbour.value, sys.argv, 'sparsify' in AUTO_QUANTIZER_MAPPING)\n"
        "    sys.exit(7)\n"
    )
    done = _exec("python", "tool/script.py", "--help", "-x", cwd=tmp_path)
    assert done.stdout == "found ['tool/script.py', '--help', '-x'] True\n", done.stderr
    assert done.returncode == 7


def test_module_runs_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text("import sys; print(__name__, sys.argv[1:])\n")
    done = _exec("--", "python", "-m", "tool", "--format", "json", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("__main__ ['--format', 'json']\n", 0), done.stderr


def test_module_that_misses_a_package_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text("import not_installed\n")
    done = _exec("python", "-m", "tool", cwd=tmp_path)
    assert done.returncode == 1
    assert "tool.py" in done.stderr
    assert "No module named 'not_installed'" in done.stderr


def test_code_is_main_and_a_message_is_exit_code_1() -> None:
    done = _exec("python", "-c", "import sys; sys.exit(f'{__name__} {sys.argv}')", "a")
    assert (done.returncode, done.stderr) == (1, "__main__ ['-c', 'a']\n")


def test_console_script_runs_by_its_name() -> None:
    done = _exec("pytest", "--version")
    assert done.returncode == 0, done.stderr
    assert "pytest" in done.stdout + done.stderr
