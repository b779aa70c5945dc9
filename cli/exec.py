"""`sparsify exec -- COMMAND ARGS`: another Python program, in this process, with sparsify checkpoints registered.

For where the entry point is off (SPARSIFY_AUTOLOAD=0, TORCH_DEVICE_BACKEND_AUTOLOAD=0). Only this process is covered:
programs that start others (torchrun, accelerate launch) need the entry point in them.
"""

import importlib.metadata
import importlib.util
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sparsify.autoload import install
from sparsify.errors import SparsifyError, suggest


def register(app: typer.Typer) -> None:
    """Adds the command."""
    settings = {"allow_interspersed_args": False, "ignore_unknown_options": True}
    app.command("exec", context_settings=settings, rich_help_panel="Run other tools")(execute)


def execute(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND [ARGS]...", show_default=False)],
) -> None:
    """Run another Python tool in which sparse checkpoints load sparse.

    COMMAND is a command that a Python package installed, a script, or python with a script, -m MODULE or -c CODE.
    Its exit code is passed on. Needed only where the automatic registration is switched off.

    [dim]$[/] sparsify exec -- lm_eval --model hf --model_args pretrained=out --tasks piqa

    [dim]$[/] sparsify exec -- lm_eval --model sparsify --model_args pretrained=out,protocol=decode --tasks piqa

    [dim]$[/] sparsify exec -- python -m my.tool out
    """
    run = resolve(command)
    install()
    if any(Path(part).name in ("lm_eval", "lm-eval") for part in command):
        _add_model_type()
    run()


def resolve(command: list[str]) -> Callable[[], None]:
    """Returns what runs the command line in this process.

    Raises SparsifyError for a command that does not exist or is not Python.
    """
    name, *arguments = command
    if _is_python(name):
        return _python(name, arguments)
    if name.endswith(".py") or (os.sep in name and Path(name).is_file() and _has_python_shebang(Path(name))):
        return _script(name, arguments)
    scripts = importlib.metadata.entry_points(group="console_scripts")
    if name in scripts.names:
        return lambda: _call(next(iter(scripts.select(name=name))), arguments)
    found = shutil.which(name)
    if found is None:
        raise SparsifyError(
            f"no command {name!r} here: sparsify exec takes a command that a Python package installed, or `python "
            f"script.py`, `python -m module`.{suggest(name, scripts.names)}"
        )
    if not _has_python_shebang(Path(found)):
        raise SparsifyError(
            f"{found} is not a Python program, so sparsify cannot be registered in it; if it starts Python itself, "
            "run it without `sparsify exec` and leave SPARSIFY_AUTOLOAD unset"
        )
    return _script(found, arguments)


def _python(name: str, arguments: list[str]) -> Callable[[], None]:
    if arguments[:1] in (["-m"], ["-c"]):
        flag, *rest = arguments
        if not rest:
            raise SparsifyError(f"`{name} {flag}` needs a {'module' if flag == '-m' else 'program'} after it")
        return (lambda: _module(rest[0], rest[1:])) if flag == "-m" else (lambda: _code(rest[0], rest[1:]))
    if not arguments or arguments[0].startswith("-"):
        given = f"`{' '.join([name, *arguments[:1]])}`"
        raise SparsifyError(
            f"{given} cannot run in this process: use {name} SCRIPT, {name} -m MODULE or {name} -c CODE"
        )
    return _script(arguments[0], arguments[1:])


def _script(path: str, arguments: list[str]) -> Callable[[], None]:
    if not Path(path).exists():
        raise SparsifyError(f"no script {path!r} in {Path.cwd()}")

    def run() -> None:
        _set_command_line([path, *arguments], str(Path(path).resolve().parent))
        runpy.run_path(path, run_name="__main__")

    return run


def _module(name: str, arguments: list[str]) -> None:
    _set_command_line([name, *arguments], str(Path.cwd()))
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except ImportError as error:
        # runpy's own refusal has no traceback below it that would help; the module's own errors keep theirs.
        if error.name is None and str(error).startswith(("No module named", "No code object")):
            raise SparsifyError(f"python -m {name}: {error}") from None
        raise


def _code(text: str, arguments: list[str]) -> None:
    _set_command_line(["-c", *arguments], "")
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


def _call(script: importlib.metadata.EntryPoint, arguments: list[str]) -> None:
    sys.argv = [shutil.which(script.name) or script.name, *arguments]
    sys.exit(script.load()())


def _set_command_line(arguments: list[str], folder: str) -> None:
    """Sets sys.argv, and the first entry of sys.path as Python does for a script, module or code."""
    sys.argv = arguments
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _add_model_type() -> None:
    """Lets lm_eval know its model type `sparsify`; where it is not installed there is nothing to tell."""
    if importlib.util.find_spec("lm_eval") is None:
        return
    # lm_eval fills its registry with its own types only where it finds it empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if "sparsify" not in model_registry:
        model_registry.register("sparsify", target="sparsify.evals.lm_eval_model:SparsifyLM")


def _is_python(name: str) -> bool:
    return Path(name).name in ("python", "python3", f"python3.{sys.version_info.minor}") or name == sys.executable


def _has_python_shebang(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(500)
    return first.startswith(b"#!") and b"python" in first
