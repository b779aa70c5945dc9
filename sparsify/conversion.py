"""The story of a conversion: targets → allocate → calibrate → fit → choose → swap.

The allocation says which candidates each linear has: with `uniform`, the method's own at its sparsity. One pass over
the calibration text streams score histograms, from which every candidate gets its threshold (`fitting`); where it was
asked for, another one means what candidates drop; a pass over a part of it measures every candidate's output error, and
each linear keeps its best. auto rotates the model first where it can, and learns its compensation last.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sparsify import __version__
from sparsify.allocation import Allocation, Problem, allocation_of
from sparsify.budget import LinearShape
from sparsify.calibration import Calibration, Progress
from sparsify.compensation import compensate_means, learned_or_not, with_uncompensated
from sparsify.config import CalibrationEntry, LinearEntry, SparsifyConfig
from sparsify.errors import SparsifyError
from sparsify.fitting import Fit, best, fit_candidates, measure_errors
from sparsify.linear import SparsitySwitch
from sparsify.methods import AnyMethod, Method, NeuronMethod
from sparsify.models import check_context
from sparsify.neuron_conversion import convert_neurons
from sparsify.plugin import attach
from sparsify.rotation import rotate as rotate_model
from sparsify.rotation import rotation_problem
from sparsify.runtime import sparse_layers
from sparsify.targets import Targets, dense_weight, find_targets, linear_shapes
from sparsify.token_layer import link_rotations, make_layer
from sparsify.trial import TargetLinear


def convert(
    model: PreTrainedModel,
    method: AnyMethod,
    calibration: Calibration,
    *,
    allocation: Allocation | str | None = None,
    rotate: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Converts the model in place and returns it; its weights are kept, not copied.

    allocation: how the budget is spent over the linears, by name or with its own options (sparsify.allocation); None
    for the method's own, which is uniform for all but auto and larosa.
    rotate: turn the model's residual stream first (sparsify.rotation.rotate), whatever the method; its weights change
    then, and not what it computes; a conversion that is refused later leaves it rotated.

    The linears of its blocks become sparse layers, and model.config.quantization_config a SparsifyConfig.
    Raises SparsifyError for a model that is converted or quantised already, or one whose budget cannot be met.
    """
    refuse_converted(model)
    _check_tokens(model, calibration.tokens)
    targets = find_targets(model, calibration.tokens[:1, :8])
    shapes = linear_shapes(model, targets)
    if isinstance(method, NeuronMethod):
        return convert_neurons(model, method, calibration, targets, shapes, allocation=allocation, progress=progress)
    method = method.bind(shapes)
    chooser = allocation_of(allocation, method)
    rotate = rotate or _rotates(model, method)
    if rotate:
        rotate_model(model, calibration, progress=progress)
    linears = _prepare(model, targets, shapes)
    choices = chooser.choices(Problem(model, method, shapes, linears, calibration, progress))
    learns = bool(getattr(method, "learns_compensation", False))
    if learns:
        choices = with_uncompensated(choices, shapes)
    fits = fit_candidates(model, linears, choices, calibration, progress)
    if not learns:
        compensate_means(model, linears, fits, calibration, progress)
    measure_errors(model, linears, fits, calibration, progress)
    chosen = learned_or_not(model, linears, fits, calibration, progress) if learns else best(fits)
    _swap(model, linears, chosen)
    _describe(model, method, chooser, calibration, targets, linears, chosen, rotate)
    return model


def _rotates(model: PreTrainedModel, method: Method) -> bool:
    rotation = getattr(method, "rotation", None)
    if rotation == "where-possible":
        return method.sparsity > 0.0 and rotation_problem(model) is None
    return rotation == "model"


def refuse_converted(model: PreTrainedModel) -> None:
    """Raises SparsifyError for a model that is converted or quantised already."""
    if sparse_layers(model):
        raise SparsifyError("this model is converted already: convert the dense model it was made from")
    if getattr(model, "is_quantized", False):
        raise SparsifyError("this model is quantised: sparsify converts models with floating-point weights")


def _check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < rows:
            raise SparsifyError(
                f"the calibration holds token id {token}, outside this model's vocabulary of {rows}: "
                "it was made with another model's tokenizer"
            )
    check_context(model, tokens.shape[1])


def _prepare(model: PreTrainedModel, targets: Targets, shapes: Mapping[str, LinearShape]) -> dict[str, TargetLinear]:
    sites = {name: index for index, site in enumerate(targets.sites) for name in site.names}
    modules = {name: model.get_submodule(name) for name in shapes}
    return {
        name: TargetLinear(
            modules[name], sites[name], dense_weight(modules[name]).detach().double().norm(dim=0).float()
        )
        for name in shapes
    }


def _swap(model: PreTrainedModel, linears: Mapping[str, TargetLinear], chosen: Mapping[str, Fit]) -> None:
    switch = SparsitySwitch()
    for name, linear in linears.items():
        fit = chosen[name]
        c = fit.candidate
        layer = make_layer(
            linear.module,
            cut=c.cut,
            scaled=c.scaled,
            rank=c.rank,
            compensated=c.compensated,
            rotated=c.rotated,
            switch=switch,
        )
        layer.threshold.fill_(fit.threshold)
        if layer.scale is not None and fit.scale is not None:
            layer.scale.copy_(fit.scale)
        if fit.lr_a is not None and fit.lr_b is not None and layer.lr_a is not None and layer.lr_b is not None:
            layer.lr_a.copy_(fit.lr_a)
            layer.lr_b.copy_(fit.lr_b)
        if layer.sparse_bias is not None and fit.compensation is not None:
            # The unfitted layer's is the dense bias, or 0; the sum is rounded once.
            layer.sparse_bias.copy_(layer.sparse_bias.float() + fit.compensation)
        model.set_submodule(name, layer)
    layers, owners = sparse_layers(model), _owners(linears, chosen)
    link_rotations(layers, owners)
    for name in owners.values():
        rotation = chosen[name].rotation
        assert rotation is not None
        layers[name].get_buffer("rotation").copy_(rotation)


def _owners(linears: Mapping[str, TargetLinear], chosen: Mapping[str, Fit]) -> dict[str, str]:
    """Returns {rotated linear: the first of its site, which stores the rotation}."""
    first: dict[int, str] = {}
    turned = [name for name in linears if chosen[name].rotation is not None]
    return {name: first.setdefault(linears[name].site, name) for name in turned}


def _describe(
    model: PreTrainedModel,
    method: Method,
    allocation: Allocation,
    calibration: Calibration,
    targets: Targets,
    linears: Mapping[str, TargetLinear],
    chosen: Mapping[str, Fit],
    rotated: bool,
) -> None:
    entries, owners = {}, _owners(linears, chosen)
    for name, linear in linears.items():
        c = chosen[name].candidate
        error = chosen[name].error / max(chosen[name].tokens, 1)
        ranks = list(linear.spectrum.energy_ranks()) if linear.spectrum is not None else None
        entries[name] = LinearEntry(
            c.sparsity, c.rho, c.rank, c.scaled, c.density, error, ranks, c.cut, c.compensated or None, owners.get(name)
        )
    config = SparsifyConfig(
        sparsify_version=__version__,
        method=method.name,
        # Not named where it is off: an older sparsify's methods do not know it.
        method_config={key: value for key, value in asdict(method).items() if (key, value) != ("compensate", False)},
        prefill="sparse",
        sites=[list(site.names) for site in targets.sites],
        left_dense=list(targets.left_dense),
        calibration=CalibrationEntry(**calibration.fingerprint),
        linears=entries,
        allocation=allocation.name,
        rotated=rotated,
    )
    attach(model, config)
