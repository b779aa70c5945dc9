"""The command line as a whole: help that teaches, a version, clean streams, and an import that stays light."""

import subprocess
import sys
from typing import Any

import pytest

import sparsify

Run = Any
COMMANDS = ["convert", "eval", "generate", "bench", "inspect", "verify", "methods", "doctor", "exec"]


def test_help_lists_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"$ sparsify {command}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"sparsify {sparsify.__version__}\n"


def test_no_command_shows_the_help(run: Run) -> None:
    assert "Usage" in run().output


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from sparsify.cli.main import build_app; build_app();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
