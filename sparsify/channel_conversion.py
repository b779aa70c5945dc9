"""Channels chosen for the linears of a model: rotate → allocate → fit → measure → choose, and the swap of layers.

The allocation says which candidates each linear has: with `uniform`, the method's own at its sparsity. One pass over
the calibration text streams score histograms, from which every candidate gets its threshold (`fitting`); where it was
asked for, another one means what candidates drop; a pass over a part of it measures every candidate's output error, and
each linear keeps its best. auto rotates the model first where it can, and learns its compensation last.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.allocation import Allocation, Choices, Problem, allocation_of
from sparsify.budget import LinearShape
from sparsify.calibration import Calibration, Progress
from sparsify.compensation import compensate_means, learned_or_not, with_uncompensated
from sparsify.config import LinearEntry
from sparsify.fitting import Fit, best, fit_candidates, measure_errors
from sparsify.linear import SparsitySwitch
from sparsify.low_rank import Svd
from sparsify.methods import Method
from sparsify.rotation import rotate as rotate_model
from sparsify.rotation import rotation_problem
from sparsify.runtime import sparse_layers
from sparsify.targets import Targets, dense_weight
from sparsify.token_layer import link_rotations, make_layer
from sparsify.trial import TargetLinear

_COLUMNS = 256


@dataclass(frozen=True)
class Channels:
    """What was chosen: the linears and their fits by name, the allocation's name, whether the model was rotated."""

    linears: Mapping[str, TargetLinear]
    fits: Mapping[str, Fit]
    allocation: str
    rotated: bool

    @property
    def owners(self) -> dict[str, str]:
        """{rotated linear: the first of its site, which stores the rotation}."""
        first: dict[int, str] = {}
        turned = [name for name, fit in self.fits.items() if fit.rotation is not None]
        return {name: first.setdefault(self.linears[name].site, name) for name in turned}

    def entries(self) -> dict[str, LinearEntry]:
        """Returns what the configuration says of every linear."""
        entries, owners = {}, self.owners
        for name, linear in self.linears.items():
            c = self.fits[name].candidate
            error = self.fits[name].error / max(self.fits[name].tokens, 1)
            spectrum = linear.spectrum
            sketched = spectrum is not None and not spectrum.exact and c.rank > 0
            entries[name] = LinearEntry(
                c.sparsity,
                c.rho,
                c.rank,
                c.scaled,
                c.density,
                error,
                None if spectrum is None else list(spectrum.energy_ranks()),
                c.cut,
                c.compensated or None,
                owners.get(name),
                spectrum.error(c.rank) if spectrum is not None and sketched else None,
            )
        return entries


def choose_channels(
    model: PreTrainedModel,
    method: Method,
    calibration: Calibration,
    targets: Targets,
    shapes: Mapping[str, LinearShape],
    *,
    allocation: Allocation | str | None,
    rotate: bool,
    progress: Progress | None,
) -> Channels:
    """Returns the choice for the linears of `shapes`; the model is rotated by then where that was asked for."""
    method = method.bind(shapes)
    chooser = allocation_of(allocation, method)
    rotate = rotate or rotates(model, method)
    if rotate:
        rotate_model(model, calibration, progress=progress)
    linears = prepare(model, targets, shapes, getattr(method, "svd", "auto"))
    choices = chooser.choices(Problem(model, method, shapes, linears, calibration, progress))
    fits = fit_channels(model, method, linears, choices, shapes, calibration, progress)
    return Channels(linears, fits, chooser.name, rotate)


def fit_channels(
    model: PreTrainedModel,
    method: Method,
    linears: Mapping[str, TargetLinear],
    choices: Choices,
    shapes: Mapping[str, LinearShape],
    calibration: Calibration,
    progress: Progress | None,
) -> dict[str, Fit]:
    """Returns the best of each linear's choices, fitted; linears may be those of one block only."""
    learns = bool(getattr(method, "learns_compensation", False))
    if learns:
        choices = with_uncompensated(choices, shapes)
    fits = fit_candidates(model, linears, choices, calibration, progress)
    if not learns:
        compensate_means(model, linears, fits, calibration, progress)
    measure_errors(model, linears, fits, calibration, progress)
    return learned_or_not(model, linears, fits, calibration, progress) if learns else best(fits)


def rotates(model: PreTrainedModel, method: Method) -> bool:
    """Whether the method itself asks for a rotation of the model, which may be on the meta device, and it can be."""
    rotation = getattr(method, "rotation", None)
    if rotation == "where-possible":
        return method.sparsity > 0.0 and rotation_problem(model) is None
    return rotation == "model"


def prepare(
    model: PreTrainedModel, targets: Targets, shapes: Mapping[str, LinearShape], svd: Svd = "auto"
) -> dict[str, TargetLinear]:
    """Returns the linears of `shapes` with their site and column norms."""
    sites = {name: index for index, site in enumerate(targets.sites) for name in site.names}
    modules = {name: model.get_submodule(name) for name in shapes}
    return {name: TargetLinear(modules[name], sites[name], _column_norms(modules[name]), svd) for name in shapes}


def _column_norms(linear: nn.Module) -> Tensor:
    """Returns the norms [I] of a weight's columns, summed in fp64; some columns at once, or a copy of four times the
    weight's bytes would be the most memory that a conversion takes."""
    parts = dense_weight(linear).detach().split(_COLUMNS, dim=1)  # type: ignore[no-untyped-call]
    return torch.cat([part.double().norm(dim=0).float() for part in parts])


def swap_channels(model: PreTrainedModel, channels: Channels, switch: SparsitySwitch) -> None:
    """Puts sparse layers with the fitted tensors in the place of the linears."""
    for name, linear in channels.linears.items():
        fit = channels.fits[name]
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
    layers, owners = sparse_layers(model), channels.owners
    link_rotations(layers, owners)
    for name in owners.values():
        rotation = channels.fits[name].rotation
        assert rotation is not None
        layers[name].get_buffer("rotation").copy_(rotation)
