"""How far a converted model's predictions are from the dense model's, token by token, on the tokens that are scored.

KL(dense ‖ sparse) in nats and the share of tokens for which both put the same token first. The dense side is the same
weights with sparsity switched off (`sparsify.runtime.dense`), run on the same batch by the same protocol right after
the sparse one: no second model, and never more than one batch of logits. Not covered: a method that changes weights
beyond rounding, whose dense side would have to be the model as it was loaded.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.evals.perplexity import batch_logits
from sparsify.runtime import dense


@dataclass
class Divergence:
    """Sums over scored tokens; `see` is what `perplexity(..., see=...)` calls."""

    model: PreTrainedModel
    protocol: str
    tokens: int = 0
    _kl: float = field(default=0.0, repr=False)
    _agreed: int = field(default=0, repr=False)

    def see(self, batch: Tensor, logits: Tensor, scored: Tensor) -> None:
        """Adds a batch: tokens [B, S], the sparse model's logits [B, S, V], scored [B, S] bool."""
        with dense(self.model):
            baseline = batch_logits(self.model, batch, self.protocol)
        # A window at a time, as in perplexity: fp32 copies of a batch's logits would be the largest tensors of all.
        for now, then, chosen in zip(logits, baseline, scored.to(batch.device), strict=True):
            kl, agreed = compared(then[:-1][chosen[1:]], now[:-1][chosen[1:]])
            self._kl += kl
            self._agreed += agreed
            self.tokens += int(chosen[1:].sum())

    def to_dict(self) -> dict[str, float | int]:
        """Returns kl (mean, nats per token), top1_agreement (share of tokens) and tokens."""
        return {"kl": self._kl / self.tokens, "top1_agreement": self._agreed / self.tokens, "tokens": self.tokens}


def compared(baseline: Tensor, logits: Tensor) -> tuple[float, int]:
    """Returns Σ KL(baseline ‖ logits) in nats over rows of logits [T, V], and how many rows have the same largest.

    The log-softmax is fp32, the sum fp64. A token that the baseline rules out (−∞) adds nothing.
    """
    p, q = F.log_softmax(baseline.float(), dim=-1), F.log_softmax(logits.float(), dim=-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    agreed = baseline.argmax(dim=-1) == logits.argmax(dim=-1)
    return float(terms.sum(dtype=torch.float64)), int(agreed.sum())
