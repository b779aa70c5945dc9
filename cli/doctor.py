"""`sparsify doctor`: what this machine has, which kernels it uses, and whether all of them compute the right thing."""

import importlib.metadata
import os
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sparsify.cli.output import Format, FormatOption, Output, SaveOption, make_table

if TYPE_CHECKING:
    from sparsify.evals.self_test import SelfTest

_PACKAGES = ("sparsify-llm", "torch", "transformers", "safetensors", "accelerate", "triton", "lm_eval", "datasets")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("doctor", rich_help_panel="Look and check")(doctor)


def doctor(
    hub: Annotated[bool, typer.Option("--hub", help="Also see whether the Hugging Face hub can be reached.")] = False,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Check this installation: versions, devices, and a self-test of every kernel against fp64.

    Exits with 1 where a self-test fails. Nothing is sent anywhere unless --hub is given.

    [dim]$[/] sparsify doctor
    """
    output = Output(format, save)
    with output.working():
        from sparsify.evals.self_test import run_self_tests

        tests = run_self_tests()
        result: dict[str, Any] = {
            "versions": versions(),
            "devices": devices(),
            "cpu_kernels": cpu_kernels(),
            "gpu_kernels": gpu_kernels(),
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

    lines = [f"cpu: {platform.machine()}, {os.cpu_count()} CPUs"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            lines.append(f"cuda:{index}: {about.name}, {about.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps: Apple GPU")
    return lines


def cpu_kernels() -> dict[str, Any]:
    """Returns what runs a converted model's layers on the CPU: backend, instruction sets, threads, CPUs allowed.

    `missing` is the line that says why the native kernels are not there, None where they are.
    """
    import torch

    from sparsify.kernels import library
    from sparsify.kernels.dispatch import preferred_backend

    native = library.load()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        # The width of a small model; no backend of ours is only for some.
        "backend": preferred_backend(torch.device("cpu"), torch.bfloat16, 1024, 1024).name,
        "isa": None if native is None else native.sp_isa_in_use().decode(),
        "isas": [] if native is None else library.isas(native),
        "threads": torch.get_num_threads(),
        "allowed_cpus": os.cpu_count() if affinity is None else len(affinity(0)),
        "missing": library.missing(),
    }


def gpu_kernels() -> dict[str, Any] | None:
    """Returns what runs a converted model's layers on the GPU, backend and source of tiles; None without a GPU.

    `missing` is the line that says why the Triton kernels are not there, None where they are.
    """
    import torch

    from sparsify.kernels.dispatch import preferred_backend
    from sparsify.kernels.triton_backend import BACKEND, is_installed

    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    assert BACKEND.missing is not None
    found: dict[str, Any] = {
        "backend": preferred_backend(device, torch.bfloat16, 1024, 1024).name,
        "tiles": None,
        "missing": BACKEND.missing(device, torch.bfloat16),
    }
    if is_installed():
        from sparsify.kernels.gpu.tiles import table_of

        table = table_of(device)
        found["tiles"] = f"tuned for {table.device}" if table.tiles else "by rule; `sparsify tune` finds better ones"
    return found


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


def _render(console: Console, result: dict[str, Any], tests: "list[SelfTest]") -> None:
    table = make_table("Versions", "package", "version", left=2)
    for name, version in result["versions"].items():
        table.add_row(name, version or "not installed")
    console.print(table)
    console.print("[bold]Devices[/]")
    for line in result["devices"]:
        console.print(f"  {line}")
    for line in _kernel_lines(result["cpu_kernels"]):
        console.print(f"    {line}", markup=False)
    if (gpu := result["gpu_kernels"]) is not None:
        line = f"{gpu['backend']} backend on the GPU; tiles {gpu['tiles']}" if gpu["tiles"] else str(gpu["missing"])
        console.print(f"    {line}", markup=False)
    console.print()
    _render_self_tests(console, tests)
    console.print(_entry_point_line(result["entry_point"]))
    if result["hub"] is not None:
        hub = result["hub"]
        reason = f" ({hub['reason']})" if hub["reason"] else ""
        console.print(f"Hub {hub['address']}: {'reachable' if hub['reachable'] else 'not reachable'}{reason}")


def _kernel_lines(kernels: dict[str, Any]) -> list[str]:
    threads = f"{kernels['threads']} thread{'s' if kernels['threads'] > 1 else ''}"
    lines = [f"{kernels['backend']} backend, {threads}; CPUs allowed: {kernels['allowed_cpus']}"]
    if kernels["isa"] is not None:
        lines.append(f"instruction set {kernels['isa']}, of {', '.join(kernels['isas'])}")
    if kernels["missing"] is not None:
        lines.append(kernels["missing"])
    return lines


def _render_self_tests(console: Console, tests: "list[SelfTest]") -> None:
    columns = ("backend", "kernel", "device", "dtype", "", "cases", "error", "allowed")
    table = make_table("Kernels, against fp64", *columns, left=5)
    for test in tests:
        verdict = "[green]ok[/]" if test.passed else "[red]failed[/]"
        error, allowed = f"{test.worst_error:.1e}", f"{test.tolerance:.0e}"
        table.add_row(_kernels_of(test), test.kernel, test.device, test.dtype, verdict, str(test.cases), error, allowed)
    console.print(table)
    for test in tests:
        if test.problem:
            where = f"{_kernels_of(test)} {test.kernel} on {test.device} in {test.dtype}"
            console.print(f"{where}: {test.problem}", style="red", markup=False)


def _kernels_of(test: "SelfTest") -> str:
    return test.backend if test.isa is None else f"{test.backend} {test.isa}"


def _entry_point_line(state: dict[str, Any]) -> str:
    off = state["switched_off_by"]
    if state["installed"] and not off:
        return "Entry point: on; from_pretrained and lm_eval find sparse checkpoints without `import sparsify`"
    why = f"switched off by {off[0]}=0" if state["installed"] else "not installed"
    return f"Entry point: {why}; run other tools with `sparsify exec -- COMMAND`, or `import sparsify` first"
