"""Reconstruction: each ReLU-fied MLP is fitted to its own dense outputs on calibration text.

MLP by MLP: its inputs and its dense outputs are collected, the activation is swapped, and gate, up and down are trained
to give the same outputs (APHQ-ViT, arXiv 2504.02508, does so for the MLPs of vision models). Inputs are those of the
model whose earlier MLPs are fitted already, or of the dense one. In memory beside the model: one MLP's inputs and
outputs in fp32, and fp32 copies of its weights, their gradients and Adam's two moments. With stage 2 the MLP learns
its dense outputs from the rectified norm. Not covered: experts; attention behind a rectified norm.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.calibration import Calibration, Progress, hooked, run_batches
from sparsify.errors import SparsifyError
from sparsify.fingerprint import weights_sha256
from sparsify.neuron_cut import Mlp
from sparsify.output_weights import output_weights
from sparsify.rectified import is_rectified, rectify
from sparsify.relufication import Relufication, Swap, prepare_swap
from sparsify.strict import read_json
from sparsify.whole_file import write_whole

Inputs = Literal["converted", "dense"]
Weighting = Literal["plain", "hessian"]
_STATE = "reconstruction.json"


@dataclass(frozen=True)
class Reconstruction:
    """How MLPs are fitted.

    epochs: passes over the calibration tokens for each MLP. inputs: "converted", of the model whose earlier MLPs are
    fitted, or "dense". weighting: "plain", every output alike, or "hessian" (sparsify.output_weights). sparsity_weight:
    weight of the log of the mean activation beside the relative error; more of it leaves more zeros. Adam with a
    cosine from learning_rate to 0, batches of batch_tokens tokens. Raises SparsifyError for a value out of range.
    """

    epochs: int = 10
    inputs: Inputs = "converted"
    weighting: Weighting = "plain"
    sparsity_weight: float = 0.0
    learning_rate: float = 1e-3
    batch_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("inputs", get_args(Inputs)), ("weighting", get_args(Weighting))):
            if getattr(self, name) not in allowed:
                raise SparsifyError(f"{name} is {getattr(self, name)!r}, allowed are {', '.join(allowed)}")
        for name in ("epochs", "batch_tokens"):
            if getattr(self, name) < 1:
                raise SparsifyError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if not 0.0 < self.learning_rate < 1.0:
            raise SparsifyError(f"learning_rate is {self.learning_rate}, it must be between 0 and 1")
        if not 0.0 <= self.sparsity_weight < 1.0:
            raise SparsifyError(f"sparsity_weight is {self.sparsity_weight}, it must be in [0, 1)")


@dataclass(frozen=True)
class FittedMlp:
    """One MLP's relative error E‖w·(y − ŷ)‖²/E‖w·y‖² and share of zeros, right after the swap and after the fit."""

    mlp: str
    swapped_error: float
    error: float
    swapped_zeros: float
    zeros: float


def reconstruct(
    model: PreTrainedModel,
    relufication: Relufication | str,
    how: Reconstruction,
    calibration: Calibration,
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> tuple[FittedMlp, ...]:
    """Swaps the activation of every MLP and fits the MLPs, in place; returns what each fit did, in call order.

    state: a folder that takes each fitted MLP when it is done; with the same model, text and settings a stopped run
    goes on from there, to the same weights. Deterministic on one machine. Raises SparsifyError as relufy does, for
    values that are not finite, and for a state of another run.
    """
    relufication = Relufication(relufication) if isinstance(relufication, str) else relufication
    fingerprint = _fingerprint(model, relufication, how, calibration)
    swap = prepare_swap(model, relufication, calibration, progress=progress)
    mlps = swap.parts.mlps
    kept = None if state is None else _State(state, fingerprint)
    weights = output_weights(model, mlps, calibration) if how.weighting == "hessian" else {}
    # An MLP sees the dense model where everything before it is dense still.
    order = mlps if how.inputs == "converted" else mlps[::-1]
    fitted: dict[str, FittedMlp] = {}
    for number, mlp in enumerate(order):
        if how.inputs == "converted":
            swap.rectify_before(mlp)
        done = None if kept is None else kept.read(number, mlp, model)
        if done is None:
            fit = _Fit(model, mlp, calibration, weights.get(mlp.down))
            swap.apply(mlp)
            fit.follow(swap)
            done = fit.run(how, seed=how.seed + number)
            if kept is not None:
                kept.write(number, done, fit.stored())
        else:
            swap.apply(mlp)
        fitted[mlp.down] = done
        if progress is not None:
            progress("reconstruct", number + 1, len(order))
    swap.finish()
    return tuple(fitted[mlp.down] for mlp in mlps)


class _Fit:
    """The inputs [T, D] and dense outputs [T, O] of one MLP, and its linears as trainable fp32 copies."""

    def __init__(self, model: PreTrainedModel, mlp: Mlp, calibration: Calibration, weight: Tensor | None) -> None:
        self.model, self.mlp = model, mlp
        self.x, self.y = _collect(model, mlp, calibration)
        self.weight = torch.ones(self.y.shape[1], device=self.y.device) if weight is None else weight
        self.scale = (self.y.square() * self.weight).mean()
        self.linears = {name: copy.deepcopy(model.get_submodule(name)).float() for name in mlp.linears}
        for linear in self.linears.values():
            linear.requires_grad_(True)

    def follow(self, swap: Swap) -> None:
        """Rectifies the inputs and the copies where the swap did so in the model."""
        norm = swap.parts.norm_of(self.mlp)
        if norm is not None:
            self.x.relu_()
        for name, linear in self.linears.items():
            if is_rectified(self.model.get_submodule(name)):
                rectify(linear)

    def run(self, how: Reconstruction, *, seed: int) -> FittedMlp:
        """Trains the copies and puts them, rounded, into the model."""
        swapped_error, swapped_zeros = self._measure()
        parameters = [p for linear in self.linears.values() for p in linear.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=how.learning_rate)
        batches = -(-len(self.x) // how.batch_tokens)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, how.epochs * batches)
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            for _ in range(how.epochs):
                order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
                for rows in torch.split(order, how.batch_tokens):
                    optimiser.zero_grad()
                    error, activated = self._error(rows)
                    size = activated.abs().mean()
                    loss = error + how.sparsity_weight * torch.log(size.clamp_min(1e-12))
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    schedule.step()
        self._put_back()
        error_after, zeros = self._measure()
        return FittedMlp(self.mlp.down, swapped_error, error_after, swapped_zeros, zeros)

    def stored(self) -> dict[str, Tensor]:
        """Returns the fitted tensors as the model has them, by name."""
        return {name: tensor.detach().clone() for name, tensor in _tensors(self.model, self.mlp).items()}

    def _error(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        out, activated = _forward(self.linears, self.mlp, self.model.get_submodule(self.mlp.activation), self.x[rows])
        return ((out - self.y[rows]).square() * self.weight).mean() / self.scale, activated

    @torch.no_grad()
    def _measure(self) -> tuple[float, float]:
        error = zeros = 0.0
        for rows in torch.split(torch.arange(len(self.x), device=self.x.device), 4096):
            found, activated = self._error(rows)
            error += float(found) * len(rows)
            zeros += float((activated == 0).float().mean()) * len(rows)
        if not error < float("inf"):
            raise SparsifyError(
                f"the outputs of {self.mlp.down} are not finite on the calibration text: check the model in this "
                "dtype, or load it in another (--dtype)"
            )
        return error / len(self.x), zeros / len(self.x)

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, tensor in _tensors(self.model, self.mlp).items():
            module, _, kind = name.rpartition(".")
            tensor.copy_(self.linears[module].get_parameter(kind))
        # What is measured is what the model has.
        for name, linear in self.linears.items():
            linear.load_state_dict(self.model.get_submodule(name).state_dict())


def _forward(linears: Mapping[str, nn.Module], mlp: Mlp, activation: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the MLP's output and what its activation gave."""
    up = linears[mlp.up](x)
    if mlp.gate is None:
        activated: Tensor = activation(up)
        h = activated
    else:
        gate, up = up.chunk(2, dim=-1) if mlp.fused else (linears[mlp.gate](x), up)
        activated = activation(gate)
        h = activated * up
    out: Tensor = linears[mlp.down](h)
    return out, activated


class _SeenError(Exception):
    """Ends a forward where nothing that comes later is needed."""


def _collect(model: PreTrainedModel, mlp: Mlp, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Returns the inputs and outputs of an MLP; nothing behind it is computed."""
    x: list[Tensor] = []
    y: list[Tensor] = []

    def see(module: nn.Module, args: object, out: Tensor) -> None:
        y.append(out.detach().flatten(0, -2).float())
        raise _SeenError

    handle = model.get_submodule(mlp.down).register_forward_hook(see)
    try:
        with hooked({mlp.up: model.get_submodule(mlp.up)}, lambda _, rows: x.append(rows.flatten(0, -2).float())):
            for window in calibration.tokens:
                with suppress(_SeenError):
                    run_batches(model, window[None], "collect", None)
    finally:
        handle.remove()
    # Made in inference mode: clones may be used in training.
    return torch.cat(x).clone(), torch.cat(y).clone()


def _tensors(model: nn.Module, mlp: Mlp) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{kind}": parameter
        for name in mlp.linears
        for kind, parameter in model.get_submodule(name).named_parameters(recurse=False)
    }


def _fingerprint(
    model: PreTrainedModel, relufication: Relufication, how: Reconstruction, calibration: Calibration
) -> dict[str, object]:
    return {
        "weights_sha256": weights_sha256(model),
        "relufication": asdict(relufication),
        "calibration": calibration.fingerprint,
        "settings": asdict(how),
        "torch": torch.__version__,
    }


class _State:
    """A folder of fitted MLPs: who made it, and one safetensors file each, written whole."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, object]) -> None:
        self.folder = folder
        path = folder / _STATE
        if path.is_file():
            if (found := read_json(path)) != json.loads(json.dumps(fingerprint)):
                known = found if isinstance(found, dict) else {}
                keys = [key for key, value in fingerprint.items() if known.get(key) != value]
                raise SparsifyError(
                    f"{folder} is the state of another run: {', '.join(keys)} differ; give another folder, or remove it"
                )
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SparsifyError(f"{folder} is not a state folder of a reconstruction: give a new one")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dict(fingerprint), indent=1) + "\n")

    def read(self, number: int, mlp: Mlp, model: PreTrainedModel) -> FittedMlp | None:
        """Puts a fitted MLP into the model; returns None where it is not there."""
        path = self._path(number)
        if not path.with_suffix(".json").is_file():
            return None
        about = read_json(path.with_suffix(".json"))
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            tensors = load_file(path)
            if digest != about.pop("sha256"):
                raise SparsifyError(f"{path} was changed: remove {self.folder} and begin again")
            with torch.no_grad():
                for name, parameter in _tensors(model, mlp).items():
                    parameter.copy_(tensors[name])
            return FittedMlp(**about)
        except (OSError, SafetensorError, LookupError, TypeError, RuntimeError, AttributeError) as problem:
            raise SparsifyError(
                f"{path} cannot be read ({type(problem).__name__}: {problem}): remove {self.folder} and begin again"
            ) from None

    def write(self, number: int, done: FittedMlp, tensors: Mapping[str, Tensor]) -> None:
        path = self._path(number)
        data = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        path.write_bytes(data)
        # The file is whole before the one that says so is there.
        about = asdict(done) | {"sha256": hashlib.sha256(data).hexdigest()}
        write_whole(path.with_suffix(".json"), json.dumps(about, indent=1) + "\n")

    def _path(self, number: int) -> Path:
        return self.folder / f"mlp-{number:03d}.safetensors"
