"""WINA: keep the channels that contribute most, |x_j|·‖W[:,j]‖₂ > t (arXiv 2505.19427, eq. 3), uniform over linears.

The exact column norm scores every linear; the public code uses it for k and gate only. We threshold at a calibrated
quantile where the paper takes the top k of each token. Not covered: the orthogonalising rotation.
"""

from sparsify.methods import ChannelMethod, Facts

SUMMARY = "input magnitude times weight column norm against a calibrated threshold"
PAPER = "Chen et al. 2025, arXiv 2505.19427"
FACTS = Facts(
    sparsifies="the input channels of every linear",
    choice="per-token",
    rule="fixed threshold",
    tensor_parallel=True,
    kernels=("reference", "native", "triton"),
)


class Wina(ChannelMethod):
    """WINA at one sparsity."""

    name = "wina"
    score = "column-norm"


METHOD = Wina
