"""Statistical top-k: keep |x_j| > mean + z·std of the token's |x| (Spark Transformer, arXiv 2506.06644).

The paper cuts an MLP's pre-activations (and attention's) and trains with it, with z the normal quantile of the density.
Here every linear's input is cut, without training, at equal bytes, and z is the quantile of (|x_j| − mean)/std on
calibration text: magnitudes are not normal. Not covered: the paper's soft threshold, which subtracts the cutoff.
"""

from dataclasses import replace

from sparsify.budget import Candidate, LinearShape
from sparsify.methods import ChannelMethod, Facts

SUMMARY = "input magnitude above the token's own mean + z·std, z from calibration"
PAPER = "Spark Transformer, You et al. 2025, arXiv 2506.06644"
FACTS = Facts(
    sparsifies="the input channels of every linear",
    choice="per-token",
    rule="the token's mean + z·std",
    tensor_parallel=False,
    kernels=("reference",),
)


class StatisticalTopK(ChannelMethod):
    """Statistical top-k at one sparsity."""

    name = "statistical-topk"

    def cut(self, name: str, shape: LinearShape, split: Candidate) -> Candidate:
        return split if split.density == 1.0 else replace(split, cut="mean-std")


METHOD = StatisticalTopK
