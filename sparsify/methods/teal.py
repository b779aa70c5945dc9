"""TEAL: keep the channels whose input is large, |x_j| > t (arXiv 2408.14690, eq. 4).

The paper's greedy allocation over a block's linears is sparsify/allocation/greedy.py.
"""

from sparsify.methods import ChannelMethod, Facts

SUMMARY = "input magnitude against a calibrated threshold, the same sparsity in every linear"
PAPER = "Liu et al. 2024, arXiv 2408.14690"
FACTS = Facts(
    sparsifies="the input channels of every linear",
    choice="per-token",
    rule="fixed threshold",
    tensor_parallel=True,
    kernels=("reference", "native", "triton"),
)


class Teal(ChannelMethod):
    """TEAL at one sparsity."""

    name = "teal"


METHOD = Teal
