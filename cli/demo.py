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

from sparsify.cli.bench_view import cache_note
from sparsify.cli.output import byte_count, make_table, percent, print_error

_MODEL, _METHOD, _SPARSITY = "reference", "rsparse", "0.5"
_PROMPT = "def read_lines(path):"
# A shape whose weights are read from memory, as those of the models that people use are.
_SHAPE, _SHAPE_MEMORY = "tinyllama-1.1b", 8 << 30


def main(arguments: list[str]) -> int:
    """Runs the demo in a folder; returns the exit code of the first command that fails, or 0."""
    folder = Path(arguments[0] if arguments else "demo")
    checkpoint = folder / f"{_MODEL}-{_METHOD}-50"
    console = Console(highlight=False)
    if not _make_room(console, folder, checkpoint):
        return 2
    reason = shape_problem()
    for command in commands(folder, checkpoint, shape=reason is None):
        _show(console, command)
        code = subprocess.run([*_sparsify(), *command[1:]], check=False).returncode
        if code:
            print_error(f"the demo ends here: the command above left with exit code {code}")
            return code
    console.print()
    quality = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["models"][0]
    speeds = [json.loads(path.read_text(encoding="utf-8")) for path in results(folder) if path.is_file()]
    console.print(summary(quality, speeds))
    for speed in speeds:
        said = " ".join(filter(None, (f"{speed['title']}: {speed['statement']}", cache_note(speed))))
        console.print(f"[bold]{said}[/]")
    if reason is not None:
        console.print(f"Not measured: {_SHAPE}, {reason}.")
    console.print(f"Next: sparsify inspect {checkpoint}", soft_wrap=True)
    return 0


def results(folder: Path) -> tuple[Path, Path]:
    """Returns the files of `sparsify bench`: of the model, and of the shape where that is measured."""
    return folder / "bench.json", folder / "bench-shape.json"


def shape_problem() -> str | None:
    """Returns why a larger shape cannot be measured here, None where it can."""
    import torch

    from sparsify.evals.machine import available_memory
    from sparsify.kernels import library

    free = available_memory(torch.device("cpu"))
    if library.load() is None:
        return library.missing()
    if free is None or free < _SHAPE_MEMORY:
        return f"which wants {byte_count(_SHAPE_MEMORY)} of free memory, and {byte_count(free)} are there"
    return None


def commands(folder: Path, checkpoint: Path, *, shape: bool) -> list[list[str]]:
    """Returns the command lines of the demo, in order."""
    sparse = str(checkpoint)
    model_file, shape_file = map(str, results(folder))
    larger = ["--shape", _SHAPE, "--sparsity", "0.5", "--sparsity", "0.7", "--rounds", "3", "--new-tokens", "16"]
    return [
        ["sparsify", "convert", _MODEL, "--method", _METHOD, "--sparsity", _SPARSITY, "--out", sparse],
        ["sparsify", "eval", sparse, "--seq-len", "512", "--limit", "32", "--save", str(folder / "eval.json")],
        ["sparsify", "generate", sparse, "--prompt", _PROMPT, "--max-new-tokens", "64"],
        ["sparsify", "bench", sparse, "--save", model_file],
        *([["sparsify", "bench", *larger, "--save", shape_file]] if shape else []),
    ]


def summary(quality: dict[str, Any], speeds: list[dict[str, Any]]) -> Table:
    """Returns the table of `sparsify eval`'s and `sparsify bench`'s results, the fastest dense side against sparse."""
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
    for speed in speeds:
        name = _SHAPE if speed["random_weights"] else "this model"
        best = speed["sides"][speed["best_dense"]]["tokens_per_second"]
        for side in (side for side in speed["sides"].values() if side["sparse"]):
            at = percent(side["touched"]["realised_sparsity"], 0)
            table.add_row(f"tokens per second, {name} at {at}", f"{best:.1f}", f"{side['tokens_per_second']:.1f}")
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
    # Not shown as this run's where this run does not measure it.
    results(folder)[1].unlink(missing_ok=True)
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
