"""Run by torchrun: loads every checkpoint of a folder in parts, and writes down what this process computed of it."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import sparsify
from sparsify.errors import SparsifyError
from sparsify.layer_part import LayerPart
from sparsify.native_decode import native_forward_of
from sparsify.runtime import sparse_layers

PROMPT = torch.arange(3, 15)[None]


def main(checkpoints: Path, out: Path) -> None:
    """Writes RANK.pt to out: {checkpoint: what `measured` returns and more, or the error that its load raised}."""
    results = {folder.name: _results(folder, out) for folder in sorted(checkpoints.iterdir())}
    results["fsdp"] = {"error": _error(checkpoints / "teal", fsdp_size=int(torch.distributed.get_world_size()))}
    plan = {"model.layers.*.self_attn.q_proj": "packed_colwise"}
    results["packed"] = {"error": _error(checkpoints / "teal", tp_plan=plan)}
    torch.save(results, out / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured(model: Any) -> dict[str, Any]:
    """Returns the logits of a prompt and a step after it, sparse and dense, and a greedy continuation."""
    with torch.no_grad():
        prompt = model(PROMPT[:, :8], use_cache=True)
        step = model(PROMPT[:, 8:9], past_key_values=prompt.past_key_values)
        with sparsify.dense(model):
            dense = model(PROMPT).logits
        mask = torch.ones_like(PROMPT)
        generated = model.generate(PROMPT, attention_mask=mask, max_new_tokens=24, do_sample=False)
    loss = model(PROMPT, labels=PROMPT).loss
    loss.backward()
    norm = model.model.layers[0].input_layernorm.weight
    return {
        "sparse": torch.cat([prompt.logits, step.logits], dim=1),
        "dense": dense,
        "generated": generated,
        "gradient": norm.grad.to_local() if hasattr(norm.grad, "to_local") else norm.grad,
    }


def _results(folder: Path, out: Path) -> dict[str, Any]:
    read: dict[str, bool] = {}
    cut = LayerPart.of

    def of(part: LayerPart, name: str, tensor: torch.Tensor) -> torch.Tensor:
        own = cut(part, name, tensor)
        if own.shape != tensor.shape or isinstance(tensor, DTensor):
            read[name] = isinstance(tensor, DTensor)
        return own

    with patch.object(LayerPart, "of", of):
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, distributed_config=DistributedConfig(tp_plan="auto")
            )
        except SparsifyError as error:
            return {"error": str(error)}
    model.save_pretrained(out / f"saved-{folder.name}")
    try:
        sparsify.save(model, out / "never")
    except SparsifyError as error:
        refused = str(error)
    layers = sparse_layers(model)
    tensors = {
        name: {**dict(layer.named_parameters()), **dict(layer.named_buffers())} for name, layer in layers.items()
    }
    return measured(model) | {
        "native": native_forward_of(model) is not None,
        "refused": refused,
        "read_in_part": read,
        "shapes": {name: {key: list(t.shape) for key, t in own.items()} for name, own in tensors.items()},
    }


def _error(folder: Path, **asked: Any) -> str | None:
    try:
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**asked))
    except SparsifyError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
