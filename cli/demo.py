"""The main job from end to end on the bundled model, by the commands that a user would type: `make demo`.

Each command is printed and run as a program of its own; the table at the end holds what they measured.
`python -m sparsify.cli.demo [FOLDER]`, FOLDER is `demo` where none is given.
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsify.cli.bench import statement
from sparsify.cli.output import byte_count, make_table, percent, print_error

_MODEL, _METHOD, _SPARSITY = "reference", "rsparse", "0.5"
_PROMPT = "def read_lines(path):"


def main(arguments: list[str]) -> int:
    """Runs the demo in a folder; returns the exit code of the first command that fails, or 0."""
    folder = Path(arguments[0] if arguments else "demo")
    checkpoint = folder / f"{_MODEL}-{_METHOD}-50"
    console = Console(highlight=False)
    if not _make_room(console, folder, checkpoint):
        return 2
    for command in commands(folder, checkpoint):
        _show(console, command)
        code = subprocess.run([*_sparsify(), *command[1:]], check=False).returncode
        if code:
            print_error(f"the demo ends here: the command above left with exit code {code}")
            return code
    console.print()
    quality = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["models"][0]
    speed = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    console.print(summary(quality, speed))
    console.print(f"[bold]{statement(speed)}[/]")
    console.print(f"Next: sparsify inspect {checkpoint}", soft_wrap=True)
    return 0


def commands(folder: Path, checkpoint: Path) -> list[list[str]]:
    """Returns the command lines of the demo, in order."""
    sparse = str(checkpoint)
    return [
        ["sparsify", "convert", _MODEL, "--method", _METHOD, "--sparsity", _SPARSITY, "--out", sparse],
        ["sparsify", "eval", sparse, "--seq-len", "512", "--limit", "32", "--save", str(folder / "eval.json")],
        ["sparsify", "generate", sparse, "--prompt", _PROMPT, "--max-new-tokens", "64"],
        ["sparsify", "bench", sparse, "--save", str(folder / "bench.json")],
    ]


def summary(quality: dict[str, Any], speed: dict[str, Any]) -> Table:
    """Returns the table of `sparsify eval`'s and `sparsify bench`'s results, dense against sparse."""
    table = make_table(
        f"{_MODEL}, {_METHOD} at {percent(quality['nominal_sparsity'], 0)}: measured", "", "dense", "sparse"
    )
    dense, sparse = quality["dense"], quality["sparse"]
    table.add_row("perplexity", f"{dense['perplexity']:.3f}", f"{sparse['perplexity']:.3f}")
    table.add_row("bits per byte", f"{dense['bits_per_byte']:.4f}", f"{sparse['bits_per_byte']:.4f}")
    for kind, label in (("nominal", "nominal"), ("weighted", "parameter-weighted"), ("realised", "realised")):
        table.add_row(f"{label} sparsity", percent(0.0), percent(quality[f"{kind}_sparsity"]))
    sizes = [byte_count(quality[f"{name}_bytes_per_token"]) for name in ("dense", "touched")]
    table.add_row("bytes of weights touched per token", *sizes)
    table.add_row("tokens per second", *(f"{speed[name]['tokens_per_second']:.1f}" for name in ("dense", "sparse")))
    return table


def _make_room(console: Console, folder: Path, checkpoint: Path) -> bool:
    """Makes the folder and removes the checkpoint of an earlier demo, and nothing that is not one."""
    if checkpoint.exists():
        if not (checkpoint / "sparsify_manifest.json").is_file():
            print_error(f"{checkpoint} exists and is not a checkpoint of an earlier demo; move it away first")
            return False
        _show(console, ["rm", "-r", str(checkpoint)])
        shutil.rmtree(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    return True


def _show(console: Console, command: list[str]) -> None:
    console.print(f"\n$ {shlex.join(command)}", style="bold", markup=False, soft_wrap=True)
    console.file.flush()


def _sparsify() -> list[str]:
    """Returns the installed command of this Python, or the module where the scripts lie elsewhere."""
    script = Path(sys.executable).parent / "sparsify"
    return [str(script)] if script.is_file() else [sys.executable, "-m", "sparsify.cli.main"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
