"""The `sparsify` command: finds the commands in this folder and turns errors into one line and an exit code.

A command is a module here with a `register(app)`: adding one takes no change elsewhere. Exit codes: 0 done,
1 a check failed, 2 bad input, 3 a checkpoint that is missing something or was changed, 4 the machine (hub, disk,
package), 130 interrupted. An error that is none of these is a bug and keeps its traceback.
"""

import errno
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

import sparsify.cli
from sparsify.cli.output import print_error
from sparsify.errors import SparsifyError
from sparsify.launch import launched_count

# Click's base of all errors of a mistyped command line: BadParameter, UsageError, ClickException. Typer brings click
# along under names that changed with its versions, and re-exports only the first.
_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
# The commands that several processes run together, and the one that runs another tool in each.
_TOGETHER = ("convert", "sweep", "compare", "finetune", "exec")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CommandLine(TyperGroup):
    """The root command, with one place where errors become exit codes."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line and, as a program (standalone_mode), ends it with its exit code."""
        try:
            result = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except (SparsifyError, OSError, typer.Abort, _CLICK_ERROR) as error:
            code = _report(error)
        else:
            code = result if isinstance(result, int) else 0
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; told apart here because typer turns an interruption into an exit without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_error("interrupted")
            raise typer.Exit(130) from None


def _report(error: BaseException) -> int:
    """Prints the one line of an expected error and returns its exit code; raises any other OSError again."""
    if isinstance(error, SparsifyError):
        print_error(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        if error.errno not in _DISK_FULL:
            raise error
        where = f" ({error.filename})" if error.filename else ""
        print_error(f"no space left on the disk{where}; free some, or choose another folder with --out or --save")
        return 4
    if isinstance(error, typer.Abort):
        print_error("aborted")
        return 130
    message = str(getattr(error, "format_message", error.__str__)())
    command = getattr(getattr(error, "ctx", None), "command_path", "sparsify")
    stop = "" if message.endswith((".", "?")) else "."
    print_error(f"{message}{stop} Try '{command} --help'")
    return int(getattr(error, "exit_code", 2))


def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and leave.", is_eager=True),
) -> None:
    """Make a language model use only the weights that matter for each token, and measure what that costs.

    [bold]sparsify convert MODEL --out DIR[/] makes a sparse checkpoint; eval, generate
    and bench put it beside the dense model; inspect and verify look inside.
    MODEL is a local folder, a hub id, an alias such as llama-3-8b, or
    [bold]reference[/], the small trained model that comes with the package.
    """
    if version:
        typer.echo(f"sparsify {_version()}")
        raise typer.Exit
    if launched_count() > 1 and (command := context.invoked_subcommand) not in (None, *_TOGETHER):
        raise SparsifyError(
            f"sparsify {command} runs in one process, and a launcher has started {launched_count()}: start it without; "
            f"{', '.join(_TOGETHER[:-1])} take several"
        )
    # Libraries log to stderr; what they have to say below an error would drown the few lines that matter.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _version() -> str:
    import sparsify

    return str(sparsify.__version__)


def build_app() -> typer.Typer:
    """Returns the app with every command of this folder."""
    app = typer.Typer(
        name="sparsify",
        cls=CommandLine,
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    for info in sorted(pkgutil.iter_modules(sparsify.cli.__path__), key=lambda info: info.name):
        if info.name != "main":
            register = getattr(importlib.import_module(f"sparsify.cli.{info.name}"), "register", None)
            if register is not None:
                register(app)
    return app


def main() -> None:
    """The console script `sparsify`."""
    build_app()()


if __name__ == "__main__":
    main()
