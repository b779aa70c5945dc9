"""What identifies a dense model's weights, for files that must not be mixed between models."""

import hashlib

import torch
from transformers import PreTrainedModel


def weights_sha256(model: PreTrainedModel) -> str:
    """Returns the SHA-256 of the model's parameters and buffers: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
