"""The byte budget where whole neurons of MLPs are chosen: one density of neurons, so that all linears save the share.

Sparsity is a share of the bytes of all linears in the blocks, as for every method; attention, and the gate where it
chooses, are touched in full. So the neurons' density is lower than 1 − sparsity, and some budgets cannot be met.
"""

import math
from collections.abc import Mapping, Sequence

from sparsify.budget import LinearShape
from sparsify.errors import SparsifyError
from sparsify.neuron_cut import Mlp, NeuronCut

# A share of neurons that is a whole number of them but for rounding.
_ROUNDING = 1e-9


def neuron_densities(
    shapes: Mapping[str, LinearShape],
    mlps: Sequence[Mlp],
    cut: NeuronCut,
    *,
    sparsity: float,
    method: str,
    compensated: bool = False,
) -> dict[str, float]:
    """Returns the share of each MLP's neurons that a token uses, by the name of its down.

    A fixed number of neurons is rounded down, and the thresholds or counts of cut linears are paid for; so is the bias
    of every down where it is compensated.
    Raises SparsifyError with the largest sparsity that is possible where this one is not.
    """
    dense = sum(shape.dense_bytes for shape in shapes.values())
    shares = {name: share for mlp in mlps for name, share in mlp.shares(cut).items()}
    chosen = sum(share * shapes[name].dense_bytes for name, share in shares.items())
    downs = {mlp.down for mlp in mlps if compensated}
    overhead = sum(shapes[name].overhead_bytes(scaled=False, compensated=name in downs) for name in shares)
    density = 1.0 - (sparsity * dense + overhead) / chosen
    counted = cut == "prompt-top-k"
    least = 1.0 / min(mlp.neurons for mlp in mlps) if counted else 0.0
    if density < least - _ROUNDING or density <= 0.0:
        largest = ((1.0 - least) * chosen - overhead) / dense
        # Rounded down: the figure itself must be possible.
        possible = math.floor(largest * 1e4 - _ROUNDING) / 1e4
        instead = f"at most {possible:.4f} is possible" if possible > 0.0 else "no sparsity is possible"
        raise SparsifyError(
            f"sparsity {sparsity} cannot be met by method {method}: the weights that it can skip are "
            f"{chosen / dense:.1%} of the linears' bytes in this model, so {instead}; or use a method that sparsifies "
            "every linear, such as teal"
        )
    if not counted:
        return {mlp.down: density for mlp in mlps}
    return {mlp.down: math.floor(density * mlp.neurons + _ROUNDING) / mlp.neurons for mlp in mlps}
