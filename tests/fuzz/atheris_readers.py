"""Coverage-guided fuzzing of the readers of a checkpoint's small files, by atheris (pip install atheris).

    python tests/fuzz/atheris_readers.py -runs=100000

The first byte chooses the file, the rest is its content. What is refused ends in SparsifyError; anything else is a
find, which libFuzzer writes to a file: give that file as the only argument to see it again. Needs no model; a folder
of examples as an argument helps. Tried with CPython 3.11 on Linux; the hypothesis tests beside it need no atheris.
"""

import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed: pip install atheris, or run python -m pytest tests/fuzz, which does without")

with atheris.instrument_imports(include=["sparsify"]):
    from sparsify.checkpoint import LEDGER
    from sparsify.cli.settings import ConvertSettings
    from sparsify.config import SparsifyConfig
    from sparsify.errors import CheckpointError, SparsifyError
    from sparsify.header import read_header
    from sparsify.ledger import Ledger
    from sparsify.manifest import MANIFEST, check_manifest
    from sparsify.model_config import check_implementations, check_model_config
    from sparsify.preflight import INDEX, check_index
    from sparsify.strict import read_json

_FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def _config(path: Path) -> None:
    found = read_json(path, error=CheckpointError)
    if isinstance(found, dict):
        check_model_config(found)
        check_implementations(found)
        SparsifyConfig.from_dict(found.get("quantization_config", found))


_READERS = (
    ("config.json", _config),
    (LEDGER, lambda path: Ledger.from_dict(read_json(path, error=CheckpointError))),
    (MANIFEST, lambda path: check_manifest(path.parent)),
    (INDEX, lambda path: check_index(path.parent)),
    ("sparsify.yaml", ConvertSettings.from_yaml),
    ("a.safetensors", read_header),
)


def read_one(data: bytes) -> None:
    """Reads data as the file that its first byte chooses."""
    if not data:
        return
    name, read = _READERS[data[0] % len(_READERS)]
    path = _FOLDER / name
    path.write_bytes(data[1:])
    try:
        read(path)
    except SparsifyError:
        pass
    finally:
        path.unlink()


if __name__ == "__main__":
    atheris.Setup(sys.argv, read_one)
    atheris.Fuzz()
