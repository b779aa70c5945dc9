"""`sparsify doctor`: what this machine has, and whether every backend computes the right thing on it."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparsify.cli.output import Format, FormatOption, Output, SaveOption, make_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsify.kernels.spec import Backend, SparseTensors

_PACKAGES = ("sparsify-llm", "torch", "transformers", "safetensors", "accelerate", "triton", "lm_eval", "datasets")
# Norm of the error over the norm of the exact output. One rounding of the output is 2^-9 in bf16 and 2^-12 in fp16
# on average; the low-rank branch rounds twice more and the sum once.
_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
_SHAPES = ((64, 64), (33, 129), (160, 96), (512, 256))
_TOKENS = (1, 3)
_DENSITIES = (0.0, 0.1, 0.5, 1.0)
_RANKS = (0, 8)


@dataclass(frozen=True)
class SelfTest:
    """The self-test of one backend on one device in one dtype: its cases and the worst of them."""

    backend: str
    device: str
    dtype: str
    cases: int
    worst_error: float
    tolerance: float
    problem: str | None

    @property
    def passed(self) -> bool:
        return self.problem is None


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("doctor", rich_help_panel="Look and check")(doctor)


def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Also see whether the Hugging Face hub can be reached.")] = False,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Check this installation: versions, devices, and a self-test of every backend against fp64.

    Exits with 1 where a self-test fails. Nothing is sent anywhere unless --hub is given.

    [dim]$[/] sparsify doctor
    """
    output = Output(format, save)
    with output.working():
        tests = run_self_tests()
        result: dict[str, Any] = {
            "versions": versions(),
            "devices": devices(),
            "self_tests": [asdict(test) | {"passed": test.passed} for test in tests],
            "entry_point": entry_point(),
            "hub": probe_hub() if hub else None,
            "passed": all(test.passed for test in tests),
        }
    output.emit(result, lambda console: _render(console, result, tests))
    if not result["passed"]:
        raise typer.Exit(1)


def versions() -> dict[str, str | None]:
    """Returns the version of Python and of each package that matters, None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[str]:
    """Returns one line for each device that PyTorch can use."""
    import torch

    lines = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            lines.append(f"cuda:{index}: {about.name}, {about.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps: Apple GPU")
    return lines


def entry_point() -> dict[str, Any]:
    """Tells whether transformers and lm_eval find sparse checkpoints without `import sparsify`."""
    points = importlib.metadata.entry_points(group="torch.backends")
    # The first is sparsify's own switch, the second torch's for all entry points of the group.
    switches = ("SPARSIFY_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    off = [name for name in switches if os.environ.get(name) == "0"]
    return {"installed": any(point.name == "sparsify" for point in points), "switched_off_by": off}


def probe_hub() -> dict[str, Any]:
    """Asks the hub for its front page; returns whether an answer came, and the reason where none did."""
    import urllib.error
    import urllib.request

    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return {"address": address, "reachable": False, "reason": "HF_HUB_OFFLINE is set"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5):
            return {"address": address, "reachable": True, "reason": None}
    except urllib.error.HTTPError as error:
        return {"address": address, "reachable": True, "reason": f"answered {error.code}"}
    except (OSError, ValueError) as error:
        return {"address": address, "reachable": False, "reason": str(error)}


def run_self_tests() -> list[SelfTest]:
    """Runs every backend on every device and dtype that it supports."""
    import torch

    from sparsify.kernels.dispatch import backends

    names = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    tests = []
    for backend in backends():
        for name in names:
            for dtype, tolerance in _TOLERANCES.items():
                test = _self_test(backend, torch.device(name), getattr(torch, dtype), tolerance)
                if test.cases:
                    tests.append(test)
    return tests


def _self_test(backend: "Backend", device: "torch.device", dtype: "torch.dtype", tolerance: float) -> SelfTest:
    cases, worst, problem = 0, 0.0, None
    for (outputs, inputs), tokens, density, rank in _cases():
        if not backend.supports(device, dtype, inputs, outputs):
            continue
        cases += 1
        x, tensors = _random_case(outputs, inputs, tokens, density, rank, device, dtype, backend.channel_contiguous)
        where = f"[{outputs}, {inputs}], {tokens} tokens, density {density}, rank {rank}"
        try:
            error = _relative_error(backend.run(x, (tensors,))[0], exact(x, tensors))
        # A kernel can fail in any way, and the table names it.
        except Exception as raised:  # noqa: BLE001
            problem = problem or f"{where}: {type(raised).__name__}: {' '.join(str(raised).split())}"
            continue
        worst = max(worst, error)
        if not error <= tolerance:
            problem = problem or f"{where}: error {error:.1e}"
    short = str(dtype).removeprefix("torch.")
    return SelfTest(backend.name, device.type, short, cases, worst, tolerance, problem)


def _cases() -> Iterator[tuple[tuple[int, int], int, float, int]]:
    for shape in _SHAPES:
        for tokens in _TOKENS:
            for density in _DENSITIES:
                for rank in _RANKS:
                    yield shape, tokens, density, rank


def _random_case(
    outputs: int,
    inputs: int,
    tokens: int,
    density: float,
    rank: int,
    device: "torch.device",
    dtype: "torch.dtype",
    channel_contiguous: bool,
) -> "tuple[Tensor, SparseTensors]":
    import torch

    from sparsify.kernels.spec import SparseTensors

    random = torch.Generator().manual_seed(outputs * inputs + tokens)

    def normal(*shape: int) -> "Tensor":
        return torch.randn(*shape, generator=random).to(device, dtype)

    x, weight, bias = normal(tokens, inputs), normal(outputs, inputs), normal(outputs)
    scale = torch.rand(inputs, generator=random).add(0.5).to(device)
    scores = (x.float().abs() * scale).flatten()
    threshold = torch.tensor(-1.0, device=device) if density == 1 else scores.quantile(1 - density)
    if channel_contiguous:
        weight = weight.t().contiguous().t()
    factors = (normal(rank, inputs) / inputs**0.5, normal(outputs, rank)) if rank else (None, None)
    return x, SparseTensors(weight, bias, threshold.float(), scale, *factors)


def exact(x: "Tensor", t: "SparseTensors") -> "Tensor":
    """Returns y [B, O] = W (x ⊙ keep) + B A (x ⊙ ¬keep) + b in fp64; the mask is compared in fp32, as specified."""
    import torch

    keep = ~(x.float().abs() * (1.0 if t.scale is None else t.scale) <= t.threshold)
    x64 = x.double()
    y = torch.where(keep, x64, 0.0) @ t.weight.double().t()
    if t.lr_a is not None and t.lr_b is not None:
        y = y + torch.where(keep, 0.0, x64) @ t.lr_a.double().t() @ t.lr_b.double().t()
    return y if t.bias is None else y + t.bias.double()


def _relative_error(y: "Tensor", expected: "Tensor") -> float:
    return float((y.double() - expected).norm() / expected.norm())


def _render(console: Console, result: dict[str, Any], tests: list[SelfTest]) -> None:
    table = make_table("Versions", "package", "version", left=2)
    for name, version in result["versions"].items():
        table.add_row(name, version or "not installed")
    console.print(table)
    console.print("[bold]Devices[/]")
    for line in result["devices"]:
        console.print(f"  {line}")
    console.print()
    table = make_table("Backends, against fp64", "backend", "device", "dtype", "", "cases", "error", "allowed", left=4)
    for test in tests:
        verdict = "[green]ok[/]" if test.passed else "[red]failed[/]"
        error, allowed = f"{test.worst_error:.1e}", f"{test.tolerance:.0e}"
        table.add_row(test.backend, test.device, test.dtype, verdict, str(test.cases), error, allowed)
    console.print(table)
    for test in tests:
        if test.problem:
            console.print(f"{test.backend} on {test.device}: {test.problem}", style="red", markup=False)
    console.print(_entry_point_line(result["entry_point"]))
    if result["hub"] is not None:
        hub = result["hub"]
        reason = f" ({hub['reason']})" if hub["reason"] else ""
        console.print(f"Hub {hub['address']}: {'reachable' if hub['reachable'] else 'not reachable'}{reason}")


def _entry_point_line(state: dict[str, Any]) -> str:
    off = state["switched_off_by"]
    if state["installed"] and not off:
        return "Entry point: on; from_pretrained and lm_eval find sparse checkpoints without `import sparsify`"
    why = f"switched off by {off[0]}=0" if state["installed"] else "not installed"
    return f"Entry point: {why}; run other tools with `sparsify exec -- COMMAND`, or `import sparsify` first"
