"""Activation-sparse language models: convert, save, load and measure.

Everything is imported on first use, so that `import sparsify` takes milliseconds, imports no torch and touches no
CUDA. What it does do is make transformers load sparsify checkpoints (see sparsify.autoload).
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsify.autoload import install

if TYPE_CHECKING:
    from sparsify.calibration import Calibration as Calibration
    from sparsify.checkpoint import load as load
    from sparsify.checkpoint import save as save
    from sparsify.checkpoint import verify as verify
    from sparsify.config import SparsifyConfig as SparsifyConfig
    from sparsify.conversion import convert as convert
    from sparsify.errors import CheckpointError as CheckpointError
    from sparsify.errors import SparsifyError as SparsifyError
    from sparsify.errors import UnavailableError as UnavailableError
    from sparsify.ledger import Ledger as Ledger
    from sparsify.ledger import ledger_of as ledger_of
    from sparsify.methods.auto import Auto as Auto
    from sparsify.methods.cats import Cats as Cats
    from sparsify.methods.griffin import Griffin as Griffin
    from sparsify.methods.larosa import Larosa as Larosa
    from sparsify.methods.relu import Relu as Relu
    from sparsify.methods.rsparse import RSparse as RSparse
    from sparsify.methods.statistical_topk import StatisticalTopK as StatisticalTopK
    from sparsify.methods.teal import Teal as Teal
    from sparsify.methods.topk import TopK as TopK
    from sparsify.methods.wina import Wina as Wina
    from sparsify.models import load_dense as load_dense
    from sparsify.models import load_tokenizer as load_tokenizer
    from sparsify.reconstruction import Reconstruction as Reconstruction
    from sparsify.reconstruction import reconstruct as reconstruct
    from sparsify.relufication import Relufication as Relufication
    from sparsify.relufication import relufy as relufy
    from sparsify.rotation import rotate as rotate
    from sparsify.runtime import dense as dense
    from sparsify.runtime import set_prefill as set_prefill
    from sparsify.streaming.conversion import convert_streamed as convert_streamed
    from sparsify.text import Text as Text
    from sparsify.text import read_text as read_text

__version__ = "0.1.0"

# Public name -> the module that defines it; tests/test_architecture.py holds it equal to the imports above.
_PUBLIC = {
    "Calibration": "sparsify.calibration",
    "CheckpointError": "sparsify.errors",
    "Ledger": "sparsify.ledger",
    "Auto": "sparsify.methods.auto",
    "Cats": "sparsify.methods.cats",
    "Griffin": "sparsify.methods.griffin",
    "Larosa": "sparsify.methods.larosa",
    "RSparse": "sparsify.methods.rsparse",
    "Reconstruction": "sparsify.reconstruction",
    "Relu": "sparsify.methods.relu",
    "Relufication": "sparsify.relufication",
    "SparsifyConfig": "sparsify.config",
    "SparsifyError": "sparsify.errors",
    "StatisticalTopK": "sparsify.methods.statistical_topk",
    "Teal": "sparsify.methods.teal",
    "Text": "sparsify.text",
    "TopK": "sparsify.methods.topk",
    "UnavailableError": "sparsify.errors",
    "Wina": "sparsify.methods.wina",
    "convert": "sparsify.conversion",
    "convert_streamed": "sparsify.streaming.conversion",
    "dense": "sparsify.runtime",
    "ledger_of": "sparsify.ledger",
    "load": "sparsify.checkpoint",
    "load_dense": "sparsify.models",
    "load_tokenizer": "sparsify.models",
    "read_text": "sparsify.text",
    "reconstruct": "sparsify.reconstruction",
    "relufy": "sparsify.relufication",
    "rotate": "sparsify.rotation",
    "save": "sparsify.checkpoint",
    "set_prefill": "sparsify.runtime",
    "verify": "sparsify.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


install()
