"""A dense model of a named shape on the disk: `python -m sparsify.evals.random_checkpoint SHAPE DIR`.

For tries of models that are larger than memory. Weights are cyclic parts of one table of seeded normal numbers, scaled
as those of `random_model` are: each matrix starts at another place of it, and less than one matrix is in memory. The
tokenizer is the reference model's.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsify.errors import SparsifyError
from sparsify.evals.shapes import SHAPES, shape_config
from sparsify.models import REFERENCE, load_tokenizer
from sparsify.new_folder import new_folder
from sparsify.tensor_file import Entry, tensor_entry, write_tensors
from sparsify.weight_files import Layout, save_description, stored_names, write_index

# Prime, so that matrices of powers of two do not start at the same places again.
_TABLE = 16_777_213


def write_random_checkpoint(name: str, out: Path) -> int:
    """Writes a bf16 model of a named shape to the new folder `out`, a file for each block; returns its bytes.

    Raises SparsifyError for an unknown shape and an `out` that exists.
    """
    config = shape_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    names, state = stored_names(model), model.state_dict()
    layout = Layout("model.layers", config.num_hidden_layers + 1, single=False)
    table = torch.randn(_TABLE, generator=torch.Generator().manual_seed(0))
    files: dict[str, list[str]] = {}
    starts: dict[str, int] = {}
    start = 0
    for held in names:
        files.setdefault(layout.file_of(layout.unit_of(held)), []).append(held)
        starts[held], start = start, (start + state[held].numel()) % _TABLE
    with new_folder(out) as folder:
        save_description(model, folder)
        load_tokenizer(REFERENCE).save_pretrained(folder)
        for file, tensors in files.items():
            entries = {names[held]: _entry(state[held], table, starts[held]) for held in tensors}
            write_tensors(folder / file, entries)
        total: int = sum(state[held].nbytes for held in names)
        write_index(folder, {names[held]: file for file, tensors in files.items() for held in tensors}, total)
    return total


def _entry(like: Tensor, table: Tensor, start: int) -> Entry:
    def chunks() -> Iterator[memoryview]:
        if like.dim() == 1:
            yield from tensor_entry(torch.ones(like.shape, dtype=like.dtype)).chunks()
            return
        # Embeddings have the size 1, products keep that of their inputs.
        scaled = table * (1.0 if like.shape[0] > 8 * like.shape[1] else like.shape[1] ** -0.5)
        scaled, place, left = scaled.to(like.dtype), start, like.numel()
        while left:
            piece = scaled[place : place + left]
            yield from tensor_entry(piece).chunks()
            place, left = 0, left - len(piece)

    empty = tensor_entry(like)
    return Entry(empty.dtype, empty.shape, empty.nbytes, chunks)


def main() -> None:
    """Writes the model that the command line names."""
    parser = argparse.ArgumentParser(description="Writes a dense model of a real shape with random weights.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    try:
        print(f"{write_random_checkpoint(given.shape, given.out) / 1e9:.2f} GB in {given.out}")
    except SparsifyError as problem:
        raise SystemExit(f"error: {problem}") from None


if __name__ == "__main__":
    main()
