"""The sizes of a dense model that the cost of a conversion depends on, from its modules; no weight is read."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sparsify.short_forward import is_expert_weight
from sparsify.skeleton import stored_dense_bytes
from sparsify.targets import decoder_blocks


@dataclass(frozen=True)
class ModelSize:
    """What the cost depends on. Bytes are in the dtype that the model has when it is loaded.

    blocks: bytes of each decoder block; rest: bytes outside of them; element_size: of the weights; flops: of one token
    through the blocks, without attention; attention: of one token for each token that it attends to; moved: values that
    a token's forward writes and reads between products; widest: the most values of one token alive in a block.
    """

    blocks: tuple[int, ...]
    rest: int
    dense_bytes: int
    element_size: int
    hidden: int
    vocabulary: int
    flops: float
    attention: float
    moved: float
    widest: int


def model_size(model: PreTrainedModel) -> ModelSize:
    """Returns the sizes of a dense model, which may be on the meta device."""
    _, blocks = decoder_blocks(model)
    config = model.config.get_text_config(decoder=True)
    inside = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    flops, moved, widest = 0.0, 0.0, 0
    for block in blocks:
        width = 0
        for module in block.modules():
            for parameter in module.parameters(recurse=False):
                share = 1.0
                if is_expert_weight(module, parameter):
                    experts = parameter.shape[0]
                    share = int(getattr(config, "num_experts_per_tok", None) or experts) / experts
                elif parameter.dim() < 2:
                    continue
                flops += 2.0 * parameter.numel() * share
                sides = sum(parameter.shape[-2:])
                moved += sides
                width = max(width, sides)
        widest = max(widest, width)
    hidden = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 1))
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    dense = stored_dense_bytes(model)
    return ModelSize(
        blocks=tuple(inside),
        rest=dense - sum(inside),
        dense_bytes=dense,
        element_size=next(p.element_size() for p in model.parameters()),
        hidden=hidden,
        vocabulary=embedding.num_embeddings,
        flops=flops,
        attention=4.0 * heads * head_dim * len(blocks),
        moved=moved,
        widest=widest,
    )
