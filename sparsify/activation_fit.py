"""The numbers of activations, fitted on calibration text before the swap: coefficients, shifts, and one cut.

Coefficients minimise Σ (u_i·‖W_down[:, i]‖)²·(act'(g_i) − act(g_i))² over tokens and neurons i of one MLP: the error of
what each neuron adds to the output, with gate g and up u (1 where there is none), by its normal equations in fp64. A
shift minimises the same over a grid, or leaves a share of zeros that was asked for. FATReLU has one cut for all MLPs,
which is what configurations can say (sparsify.relu_cuts). The papers train all of these; nothing is trained here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsify.activations import CRReLU, FatReLU, PolyNorm, PolyReLU, ShiftedReLU
from sparsify.calibration import Calibration, Progress, ScoreHistogram, run_batches
from sparsify.errors import SparsifyError
from sparsify.neuron_cut import Mlp
from sparsify.relu_cuts import relu_cuts
from sparsify.targets import dense_weight

# The functions that are replaced bend between −1 and 1: a shift that fits them is small.
_SHIFTS = torch.linspace(0.0, 1.0, 41)
_ELEMENTS = 1 << 20
_Polynomial = PolyReLU | PolyNorm | CRReLU

# Called with an MLP, its gate g, act(g) and the weight of each neuron's error, all [T, F] in fp32.
_See = Callable[[Mlp, Tensor, Tensor, Tensor], object]


def fit_shifts(
    model: PreTrainedModel,
    mlps: Sequence[Mlp],
    calibration: Calibration,
    kind: type[ShiftedReLU],
    *,
    zeros: float | None,
    progress: Progress | None = None,
) -> dict[str, nn.Module]:
    """Returns a shifted ReLU for each MLP, by the name of its down; zeros: the share that it leaves."""
    errors = {mlp.down: torch.zeros(len(_SHIFTS), dtype=torch.float64) for mlp in mlps}
    gates = {mlp.down: ScoreHistogram() for mlp in mlps}

    def see(mlp: Mlp, g: Tensor, s: Tensor, weight: Tensor) -> None:
        gates[mlp.down].add(g.relu())
        if zeros is None:
            for index, b in enumerate(_SHIFTS.tolist()):
                errors[mlp.down][index] += ((g - b).relu() - s).square().mul(weight).sum(dtype=torch.float64).cpu()

    with _watched(model, mlps, see):
        run_batches(model, calibration.tokens, "calibrate", progress)
    made: dict[str, nn.Module] = {}
    for mlp in mlps:
        if not gates[mlp.down].finite:
            raise _not_finite(mlp)
        best = float(_SHIFTS[int(errors[mlp.down].argmin())])
        module = kind().to(device=model.device, dtype=model.dtype)
        module.shift.fill_(best if zeros is None else max(gates[mlp.down].threshold(1.0 - zeros), 0.0))
        made[mlp.down] = module
    return made


def fit_coefficients(
    model: PreTrainedModel,
    mlps: Sequence[Mlp],
    calibration: Calibration,
    kind: type[_Polynomial],
    *,
    progress: Progress | None = None,
) -> dict[str, nn.Module]:
    """Returns a PolyReLU, PolyNorm or CRReLU for each MLP, by the name of its down."""
    size = len(kind().coefficients)
    products = {mlp.down: torch.zeros(size, size + 1, dtype=torch.float64) for mlp in mlps}

    def see(mlp: Mlp, g: Tensor, s: Tensor, weight: Tensor) -> None:
        target = s - g.relu() if kind is CRReLU else s
        # A few tokens at a time: the features of all would be the largest tensor of the conversion.
        tokens = max(_ELEMENTS // g.shape[-1], 1)
        for g_part, target_part, weight_part in zip(
            *(torch.split(t, tokens) for t in (g, target, weight)), strict=True
        ):
            features = kind.features(g_part).flatten(1).double()
            columns = torch.cat([features, target_part.flatten()[None].double()])
            products[mlp.down] += ((features * weight_part.flatten()) @ columns.T).cpu()

    with _watched(model, mlps, see):
        run_batches(model, calibration.tokens, "calibrate", progress)
    made: dict[str, nn.Module] = {}
    for mlp in mlps:
        normal = products[mlp.down]
        if not bool(normal.isfinite().all()):
            raise _not_finite(mlp)
        module = kind().to(device=model.device, dtype=model.dtype)
        # In units of each feature's size: x³ is far larger than 1.
        unit = normal.diagonal().sqrt().clamp_min(1e-30)
        scaled = normal[:, :size] / (unit[:, None] * unit)
        module.coefficients.copy_(torch.linalg.lstsq(scaled, normal[:, size:] / unit[:, None]).solution[:, 0] / unit)
        made[mlp.down] = module
    return made


def fit_cut(
    model: PreTrainedModel,
    mlps: Sequence[Mlp],
    calibration: Calibration,
    *,
    cett: float,
    progress: Progress | None = None,
) -> float:
    """Returns one cut for all MLPs, of the model with ReLU in them, rounded to the model's dtype."""
    before = {mlp.activation: model.get_submodule(mlp.activation) for mlp in mlps}
    for name in before:
        model.set_submodule(name, nn.ReLU())
    try:
        cuts = relu_cuts(model, mlps, cett, calibration, shared=True, progress=progress)
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
    return float(torch.tensor(cuts[mlps[0].down]).to(model.dtype))


def fat_relus(mlps: Sequence[Mlp], cut: float) -> dict[str, nn.Module]:
    """Returns FATReLU for each MLP, by the name of its down."""
    return {mlp.down: FatReLU(cut) for mlp in mlps}


def _not_finite(mlp: Mlp) -> SparsifyError:
    return SparsifyError(
        f"the inputs of {mlp.activation} are not finite on the calibration text: check the model in this dtype, or "
        "load it in another (--dtype)"
    )


@contextmanager
def _watched(model: PreTrainedModel, mlps: Sequence[Mlp], see: _See) -> Iterator[None]:
    gates: dict[str, tuple[Tensor, Tensor]] = {}
    ups: dict[str, Tensor] = {}
    handles = []
    for mlp in mlps:
        norms = dense_weight(model.get_submodule(mlp.down)).detach().float().square().sum(dim=0)

        def hear_gate(module: nn.Module, args: tuple[Tensor], s: Tensor, name: str = mlp.down) -> None:
            gates[name] = (args[0], s)

        def hear_up(module: nn.Module, args: object, y: Tensor, mlp: Mlp = mlp) -> None:
            ups[mlp.down] = y.chunk(2, dim=-1)[1] if mlp.fused else y

        def before_down(module: nn.Module, args: object, mlp: Mlp = mlp, norms: Tensor = norms) -> None:
            g, s = (t.flatten(0, -2).float() for t in gates.pop(mlp.down))
            up = ups.pop(mlp.down).flatten(0, -2).float()
            see(mlp, g, s, (up.square() if mlp.gate is not None else torch.ones_like(g)) * norms)

        handles.append(model.get_submodule(mlp.activation).register_forward_hook(hear_gate))
        handles.append(model.get_submodule(mlp.up).register_forward_hook(hear_up))
        handles.append(model.get_submodule(mlp.down).register_forward_pre_hook(before_down))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
