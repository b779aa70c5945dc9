"""Run by torchrun: loads every checkpoint of a folder in parts, and writes down what this process computed of it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import sparsify
from sparsify.errors import SparsifyError
from sparsify.native_decode import native_forward_of
from sparsify.runtime import sparse_layers


def main(checkpoints: Path, out: Path) -> None:
    """Writes RANK.pt to out: {checkpoint: results}, or the error that its load raised."""
    results: dict[str, Any] = {}
    for folder in sorted(checkpoints.iterdir()):
        results[folder.name] = _results(folder, out)
    rank = torch.distributed.get_rank()
    torch.save(results, out / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _results(folder: Path, out: Path) -> dict[str, Any]:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    except SparsifyError as error:
        return {"error": str(error)}
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        prompt = model(tokens[:, :8], use_cache=True)
        step = model(tokens[:, 8:9], past_key_values=prompt.past_key_values)
        with sparsify.dense(model):
            dense = model(tokens).logits
        generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
    with_gradients = model(tokens).logits
    model.save_pretrained(out / f"saved-{folder.name}")
    return {
        "sparse": torch.cat([prompt.logits, step.logits], dim=1),
        "dense": dense,
        "with_gradients": with_gradients.detach(),
        "generated": generated,
        "native": native_forward_of(model) is not None,
        "shapes": {
            name: {
                key: list(t.shape) for key, t in (*layer._parameters.items(), *layer._buffers.items()) if t is not None
            }
            for name, layer in sparse_layers(model).items()
        },
        "bytes": sum(t.nbytes for layer in sparse_layers(model).values() for t in layer.buffers()),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps({"done": True}))
