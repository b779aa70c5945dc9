"""Run by torchrun: one process of several that run the command lines of a JSON file, one after another.

Each stands in a list of its own; OUT in it is the folder of what they write. What was printed and how it ended goes to
INDEX.json in that folder.
"""

import json
import os
import sys
from pathlib import Path

from typer.testing import CliRunner

from sparsify.cli.main import build_app


def main(commands: Path, out: Path) -> None:
    """Runs the commands in the folder `out`."""
    os.chdir(out)
    app, runner, said = build_app(), CliRunner(), []
    for command in json.loads(commands.read_text()):
        result = runner.invoke(app, command)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        said.append({"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr})
    Path(f"{os.environ['RANK']}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
