"""FFN sparsity of a model with ReLU: the share of zeros that enter its down projections, and the perplexity with them.

The mean over layers and tokens of the zeros in x₁ = σ(gate x)·up x, every token of the windows, at FATReLU's t: an
activation counts where it is above t, else it is 0 in the forward, too (ProSparse, arXiv 2402.13516 eq. 4). t is
compared in fp32, as the converted checkpoint does it. Not covered: what these zeros save, which is the ledger's.

    python -m sparsify.evals.ffn_sparsity MODEL --shifts 0,0.32,0.64 --windows 64  # one line of JSON for each shift
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.calibration import hooked
from sparsify.evals.perplexity import perplexity
from sparsify.methods.relu import Relu
from sparsify.models import load_dense, load_tokenizer
from sparsify.neuron_cut import Mlp
from sparsify.relu_conversion import find_relu_mlps
from sparsify.targets import find_targets
from sparsify.text import Windows, read_text
from sparsify.text import windows as windows_of

# The paper's t, and what no activation of a model that is worth cutting is below.
_FIRST_SHIFT, _LAST_SHIFT = 0.01, 100.0


@dataclass(frozen=True)
class FfnSparsity:
    """Zeros by the name of each down projection, in [0, 1], and the perplexity, both at the shift t."""

    shift: float
    perplexity: float
    zeros: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean over layers."""
        return sum(self.zeros.values()) / len(self.zeros)


def ffn_sparsity(
    model: PreTrainedModel,
    mlps: Sequence[Mlp],
    windows: Windows,
    shift: float = 0.0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> FfnSparsity:
    """Measures both in one pass. Raises SparsifyError as perplexity does."""
    zeros = {mlp.down: 0 for mlp in mlps}
    seen = dict(zeros)

    def see(name: str, x: Tensor) -> None:
        zeros[name] += int((x == 0).sum())
        seen[name] += x.numel()

    def cut(module: nn.Module, args: object, y: Tensor) -> Tensor:
        return torch.where(y.float() <= shift, 0.0, y).to(y.dtype)

    with ExitStack() as hooks:
        for mlp in mlps:
            hooks.callback(model.get_submodule(mlp.activation).register_forward_hook(cut).remove)
        hooks.enter_context(hooked({mlp.down: model.get_submodule(mlp.down) for mlp in mlps}, see))
        found = perplexity(model, windows, progress=progress)
    return FfnSparsity(shift, found.perplexity, {name: zeros[name] / seen[name] for name in zeros})


def largest_shift(
    model: PreTrainedModel, mlps: Sequence[Mlp], windows: Windows, rise: float
) -> tuple[float, list[FfnSparsity]]:
    """Returns the largest t of 0.01·2ᵏ that raises the perplexity by at most `rise`, 0 where none does, and all tried.

    The first t that raises it by more ends the search: what it drops, a larger one drops, too.
    """
    points = [ffn_sparsity(model, mlps, windows)]
    shift = _FIRST_SHIFT
    while shift <= _LAST_SHIFT:
        points.append(ffn_sparsity(model, mlps, windows, shift))
        if points[-1].perplexity > points[0].perplexity * (1.0 + rise):
            return points[-2].shift, points
        shift *= 2.0
    return points[-1].shift, points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model with ReLU, as `sparsify finetune` writes it")
    parser.add_argument("--shifts", default="0,0.01", help="t of FATReLU, several")
    parser.add_argument("--text", default="stdlib:evaluation")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    model = load_dense(args.model)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    mlps = find_relu_mlps(model, Relu(), find_targets(model, tokens), tokens)
    text = windows_of(read_text(args.text), load_tokenizer(args.model), seq_len=args.seq_len, limit=args.windows)
    for shift in args.shifts.split(","):
        point = ffn_sparsity(model, mlps, text, float(shift))
        print(json.dumps({"model": args.model, "mean": point.mean} | asdict(point)), flush=True)


if __name__ == "__main__":
    main()
