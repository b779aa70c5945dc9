"""`sparsify inspect`: what is in a converted checkpoint, or what a conversion would find in a dense model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparsify.cli.inspect_neurons import inspect_neurons, load_with_windows, positions_of
from sparsify.cli.ledger_view import ledger_totals, print_left_dense, totals_table
from sparsify.cli.loading import TrustOption, identify, is_converted
from sparsify.cli.output import Format, FormatOption, Output, SaveOption, common_prefix, make_table, percent
from sparsify.cli.progress import Progress
from sparsify.cli.sites import describe_sites, sites_table
from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Windows and their tokens that an estimate runs.
_ESTIMATED = (4, 128)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("inspect", rich_help_panel="Look and check")(inspect)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A converted checkpoint, or a dense model.")],
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Collect what `sparsify report` draws of a checkpoint's activations on this text; with --save.",
        ),
    ] = None,
    neurons: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Instead: what the neurons of its MLPs do on this text: zeros, dead ones, which are on together.",
        ),
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option("--estimate/--no-estimate", help="Run a dense model on a short text: how sparse it could be."),
    ] = True,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Look inside a checkpoint: its settings, its byte ledger, and every linear.

    For a dense model: the linears that a conversion would make sparse, found
    by structure, what it would leave dense, and an estimate of how sparse it
    could be, by output error on a few windows of text; with --no-estimate no
    weight is read.

    With --neurons, of either: the natural zeros of each MLP on a text (the
    dynamic dead-neuron rate, AP), neurons that are never on, and co-activation.

    [dim]$[/] sparsify inspect reference-50
    [dim]$[/] sparsify inspect reference
    [dim]$[/] sparsify inspect reference-relu --neurons stdlib:evaluation
    """
    output = Output(format, save)
    if neurons is not None:
        if activations is not None:
            raise SparsifyError("--activations and --neurons are two looks at a text: give one of them")
        return inspect_neurons(model, neurons, output, trust_remote_code)
    if activations is not None:
        return _inspect_activations(model, activations, output, trust_remote_code)
    with output.working(), Progress() as progress:
        from sparsify.models import load_dense, resolve_model
        from sparsify.skeleton import read_skeleton

        source = resolve_model(model)
        converted = is_converted(source)
        if converted:
            result = {"model": model, "converted": True} | describe_checkpoint(Path(source))
        else:
            skeleton = read_skeleton(model, trust_remote_code=trust_remote_code)
            result = {"model": model, "converted": False} | describe_sites(skeleton.model)
            if estimate:
                progress.note(f"loading {model}")
                dense = load_dense(model, device="cpu", trust_remote_code=trust_remote_code)
                result["estimate"] = _estimate(model, dense, progress, trust_remote_code)
    output.emit(result, lambda console: (_render_checkpoint if converted else _render_dense)(console, result))


def _estimate(spec: str, model: "PreTrainedModel", progress: Progress, trust_remote_code: bool) -> dict[str, Any]:
    """Returns how sparse a dense model could be by output error, or, under "problem", why that was not estimated."""
    from sparsify.calibration import Calibration
    from sparsify.evals.headroom import headroom
    from sparsify.models import load_tokenizer
    from sparsify.text import read_text

    try:
        tokenizer = load_tokenizer(spec, trust_remote_code=trust_remote_code)
    except SparsifyError as problem:
        # A model without a tokenizer can still be looked at.
        return {"problem": str(problem)}
    sequences, length = _ESTIMATED
    length = min(length, positions_of(model))
    text = read_text("stdlib:calibration")
    calibration = Calibration.from_text(text, tokenizer, sequences=sequences, seq_len=length)
    kinds = [asdict(kind) for kind in headroom(model, calibration, progress)]
    return {"text": text.name, "sequences": sequences, "seq_len": length, "kinds": kinds}


def _inspect_activations(model: str, text: str, output: Output, trust_remote_code: bool) -> None:
    """Collects and emits what a report draws of a checkpoint's activations."""
    with output.working(), Progress() as progress:
        from sparsify.evals.activations import collect_activations
        from sparsify.evals.machine import environment

        loaded, cut = load_with_windows(model, text, progress, trust_remote_code)
        about = {"model": model, "checkpoint_sha256": identify(loaded.model)}
        result = about | collect_activations(loaded.model, cut, progress) | environment(loaded.model.device)
    output.emit(result, lambda console: _render_activations(console, result))


def _render_activations(console: Console, result: dict[str, Any]) -> None:
    found = result["sparsity_by_position"]
    console.print(
        f"Collected {len(result['activations'])} linears on {result['tokens']:,} tokens of {result['text']}: sparsity "
        f"nominal {percent(result['nominal_sparsity'])}, weighted {percent(result['weighted_sparsity'])}, realised "
        f"{percent(sum(found) / len(found))} over all positions, {percent(found[0])} at the first token of a window.",
        markup=False,
    )
    console.print("Save it with --save FILE and give that to `sparsify report` as --results.", markup=False)


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Returns configuration, ledger totals and every linear of a checkpoint; only headers and thresholds are read.

    Raises CheckpointError where it is not a sound one.
    """
    from sparsify.checkpoint import read_config, read_ledger
    from sparsify.manifest import checkpoint_sha256

    config, ledger = read_config(folder), read_ledger(folder)
    thresholds = _thresholds(folder)
    sizes = {linear.name: linear for linear in ledger.linears}
    return {
        "method": config.method,
        "method_config": config.method_config,
        "allocation": config.allocation,
        "rotated": config.rotated,
        "prefill": config.prefill,
        "neurons": None if config.neurons is None else asdict(config.neurons),
        "calibration": asdict(config.calibration),
        "sparsify_version": config.sparsify_version,
        "schema_version": config.schema_version,
        "checkpoint_sha256": checkpoint_sha256(folder),
        "ledger": ledger_totals(ledger),
        "linears": [
            {"name": name, "threshold": thresholds.get(name), **_size(sizes.get(name)), **asdict(entry)}
            for name, entry in config.linears.items()
        ],
    }


def _size(linear: Any) -> dict[str, Any]:
    if linear is None:
        return {}
    return {
        "outputs": linear.outputs,
        "inputs": linear.inputs,
        "dense_bytes": linear.dense_bytes,
        "touched_bytes": linear.touched_bytes,
    }


def _thresholds(folder: Path) -> dict[str, float]:
    from safetensors import SafetensorError, safe_open

    from sparsify.errors import CheckpointError
    from sparsify.preflight import check_index

    found = {}
    for path in check_index(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if key.endswith(".threshold"):
                        found[key.removesuffix(".threshold")] = float(file.get_tensor(key))
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(f"{path.name} cannot be read: {problem}; see `sparsify verify {folder}`") from None
    return found


def _render_checkpoint(console: Console, result: dict[str, Any]) -> None:
    about = result["calibration"]
    options = ", ".join(f"{k} {v}" for k, v in result["method_config"].items() if v is not None and k != "recipe")
    rotated = ", rotated" if result["rotated"] else ""
    console.print(
        f"[bold]{result['method']}[/] ({options}), allocation {result['allocation']}{rotated}, prefill "
        f"{result['prefill']}"
    )
    console.print(
        f"Calibrated on {about['sequences']} × {about['seq_len']} tokens of {about['source']} "
        f"(sha256 {about['sha256'][:12]}); written by sparsify {result['sparsify_version']}, "
        f"schema {result['schema_version']}",
        markup=False,
    )
    if result["neurons"] is not None:
        neurons = result["neurons"]
        console.print(f"Neurons are chosen by {neurons['cut']} in {len(neurons['mlps'])} MLPs; what they do on a text:")
        console.print(f"sparsify inspect {result['model']} --neurons TEXT", markup=False, soft_wrap=True)
    console.print()
    console.print(totals_table(result["ledger"]))
    console.print(_linears_table(result["linears"]))
    print_left_dense(console, result["ledger"]["left_dense"])
    _render_summary(console, result)


def _render_summary(console: Console, result: dict[str, Any]) -> None:
    """Says what the linears' table comes to, and which commands measure the rest."""
    linears = result["linears"]
    errors = {linear["name"]: linear["error"] for linear in linears}
    worst = max(errors, key=lambda name: errors[name])
    low_rank = sum(linear["rank"] > 0 for linear in linears)
    console.print(
        f"Output error on calibration text: mean {percent(sum(errors.values()) / len(errors))}, worst "
        f"{percent(errors[worst])} ({worst}). Low rank in {low_rank} of {len(linears)} linears. Quality, speed and "
        "pictures:",
        markup=False,
    )
    for command in ("eval", "bench", "report"):
        console.print(f"sparsify {command} {result['model']}", markup=False, soft_wrap=True)


def _linears_table(linears: list[dict[str, Any]]) -> Table:
    """Names lose the prefix that all share, so that a row fits 80 columns."""
    prefix = common_prefix([linear["name"] for linear in linears])
    title = f"Linears of {prefix.rstrip('.')}" if prefix else "Linears"
    table = make_table(title, "linear", "saved", "rho", "rank", "density", "threshold", "error")
    for linear in linears:
        dense = linear.get("dense_bytes")
        saved = 1 - linear["touched_bytes"] / dense if dense else None
        threshold = linear["threshold"]
        table.add_row(
            linear["name"].removeprefix(prefix), percent(saved), f"{linear['rho']:g}", str(linear["rank"]),
            percent(linear["density"]), "-" if threshold is None else f"{threshold:.3g}", percent(linear["error"]),
        )  # fmt: skip
    return table


def _render_dense(console: Console, result: dict[str, Any]) -> None:
    console.print(sites_table(result["kinds"]))
    print_left_dense(console, result["left_dense"])
    if "estimate" in result:
        _render_estimate(console, result["estimate"], result["model"])
    console.print(
        f"A dense model: {result['linears']} linears at {result['sites']} input sites can be made sparse. Next:",
    )
    # On a line of its own that is never folded, to be copied.
    console.print(f"sparsify convert {result['model']} --sparsity 0.5 --out DIR", markup=False, soft_wrap=True)


def _render_estimate(console: Console, found: dict[str, Any], model: str) -> None:
    if "problem" in found:
        console.print(f"No estimate of how sparse it could be: {found['problem']}", markup=False)
        return
    errors = list(found["kinds"][0]["sparsity"])
    columns = (f"at {percent(float(error), 0)} error" for error in errors)
    table = make_table("Bytes that could go: an estimate by output error", "linear", "zeros", *columns)
    for kind in found["kinds"]:
        style = "bold" if kind["linear"] == "all" else None
        shares = (percent(kind["sparsity"][error], 0) for error in errors)
        table.add_row(kind["linear"], percent(kind["zeros"]), *shares, style=style)
    console.print(table)
    console.print(
        f"Each linear alone, on inputs of the dense model, {found['sequences']} × {found['seq_len']} tokens of "
        f"{found['text']}; zeros are inputs that are 0 already. What perplexity says is measured by:",
        markup=False,
    )
    for command in (f"sparsify measure {model}", f"sparsify convert {model} --max-ppl-increase 1% --out DIR"):
        console.print(command, markup=False, soft_wrap=True)
