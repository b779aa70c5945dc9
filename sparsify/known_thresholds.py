"""Makes some linears of a model sparse with thresholds that are known already, and leaves all others dense.

What a conversion fits from a byte budget, this takes as given: channel j of a linear is kept where
|x_j|·‖W[:, j]‖₂ > threshold. PPL-p% sparsity (sparsify.evals.ppl_p) finds such thresholds from a quality budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsify import __version__
from sparsify.calibration import Calibration
from sparsify.config import CalibrationEntry, LinearEntry, SparsifyConfig
from sparsify.conversion import refuse_converted
from sparsify.errors import SparsifyError
from sparsify.linear import SparsitySwitch, make_sparse
from sparsify.plugin import attach
from sparsify.targets import dense_weight, find_targets, linear_shapes


@dataclass(frozen=True)
class Known:
    """A linear's threshold of |x_j|·‖W[:, j]‖₂, the share of channels above it and the mean of ‖ŷ − y‖²/‖y‖²."""

    threshold: float
    density: float
    error: float


def apply_thresholds(
    model: PreTrainedModel,
    known: Mapping[str, Known],
    *,
    method: str,
    options: Mapping[str, Any],
    calibration: Calibration,
) -> PreTrainedModel:
    """Converts the named linears of a dense model in place and returns it; weights are kept, not copied.

    method and options are what the checkpoint says about where the thresholds come from; the nominal sparsity is the
    share of the named linears' bytes that the densities leave out. Raises SparsifyError for a model that is converted
    or quantised already, a name that is no linear in its blocks, or where nothing would be kept.
    """
    refuse_converted(model)
    targets = find_targets(model, calibration.tokens[:1, :8])
    shapes = linear_shapes(model, targets)
    for name in known:
        if name not in shapes:
            raise SparsifyError(f"{name!r} is not a linear in the blocks of {type(model).__name__}")
    total = sum(shapes[name].dense_bytes for name in known)
    sparsity = 1.0 - sum(entry.density * shapes[name].dense_bytes for name, entry in known.items()) / total
    if not 0.0 <= sparsity < 1.0:
        raise SparsifyError(f"these thresholds keep no channel of {', '.join(known)}: use lower ones")
    switch = SparsitySwitch()
    for name, entry in known.items():
        linear = model.get_submodule(name)
        layer = make_sparse(linear, scaled=True, rank=0, switch=switch)
        layer.threshold.fill_(entry.threshold)
        assert layer.scale is not None
        with torch.no_grad():
            layer.scale.copy_(dense_weight(linear).detach().double().norm(dim=0))
        model.set_submodule(name, layer)
    dense = [name for name in shapes if name not in known]
    left = [f"{len(dense)} linears that {method} leaves dense"] if dense else []
    config = SparsifyConfig(
        sparsify_version=__version__,
        method=method,
        method_config={"sparsity": sparsity, **options},
        prefill="sparse",
        sites=[
            [name for name in site.names if name in known] for site in targets.sites if set(site.names) & set(known)
        ],
        left_dense=[*targets.left_dense, *left],
        calibration=CalibrationEntry(**calibration.fingerprint),
        linears={
            name: LinearEntry(1.0 - known[name].density, 1.0, 0, True, known[name].density, known[name].error)
            for name in shapes
            if name in known
        },
    )
    attach(model, config)
    return model
