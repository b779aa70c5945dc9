"""`sparsify eval`: perplexity of models on a text, or lm-eval tasks, dense and sparse on the same tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from sparsify.cli.evaluate_tasks import TaskFlags, evaluate_tasks
from sparsify.cli.loading import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    Loaded,
    TrustOption,
    identify,
    load,
    made_from,
)
from sparsify.cli.measurement import measure
from sparsify.cli.output import Format, FormatOption, Output, SaveOption, byte_count, make_table, percent
from sparsify.cli.placement import DeviceMapOption, MaxMemoryOption, OffloadFolderOption, Placement
from sparsify.cli.progress import Progress
from sparsify.errors import SparsifyError

if TYPE_CHECKING:
    from sparsify.text import Text, Windows

_LONGEST = 2048


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("eval", rich_help_panel="Make and measure")(evaluate)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Converted checkpoints, or dense models.", show_default=False),
    ],
    dense: Annotated[bool, typer.Option("--dense", help="Only the dense side.")] = False,
    text: Annotated[
        str | None,
        typer.Option(
            help="A .txt or .jsonl file, hf:DATASET:CONFIG:SPLIT, wikitext2 or stdlib:evaluation.",
            show_default="wikitext2; stdlib:evaluation for reference or where the hub is out of reach",
        ),
    ] = None,
    protocol: Annotated[
        Literal["every-token", "decode"],
        typer.Option(
            help="every-token: all tokens sparse. decode: dense first half, or context, as a prompt, the rest sparse."
        ),
    ] = "every-token",
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a window.", show_default=f"{_LONGEST}, or the model's longest if less")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", show_default="no overlap")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Windows, or documents of each task, at most.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or requests, at once.")] = 8,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Instead of perplexity: lm-eval tasks, such as hellaswag,arc_easy."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question.", show_default="the task's own")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with task files of your own.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Read the tasks' data from DIR/TASK/SPLIT.jsonl, not the hub.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Keep every document and answer in the JSON.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemoryOption = None,
    offload_folder: OffloadFolderOption = None,
    backend: BackendOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.human,
    save: SaveOption = None,
) -> None:
    """Measure perplexity or lm-eval tasks, dense and sparse on the same tokens.

    For a converted checkpoint the dense side is the same weights with sparsity
    switched off. Realised sparsity is what the text really left out, by the byte.

    [dim]$[/] sparsify eval reference-50
    [dim]$[/] sparsify eval reference-50 --text notes.txt --protocol decode --seq-len 512
    [dim]$[/] sparsify eval reference-50 --tasks hellaswag,piqa --limit 200 --save tasks.json
    [dim]$[/] sparsify eval llama-3-70b-50 --device-map auto --max-memory 0=70GiB,cpu=200GiB
    """
    output = Output(format, save)
    placement = Placement(device, device_map, max_memory, offload_folder)
    flags = TaskFlags(num_fewshot, include_path, task_data, log_samples)
    if tasks is not None:
        _refuse("--tasks does not take", {"--text": text, "--seq-len": seq_len, "--stride": stride})
        return evaluate_tasks(
            models, [name.strip() for name in tasks.split(",")], flags, output,
            only_dense=dense, protocol=protocol, limit=limit, batch_size=batch_size,
            dtype=dtype, placement=placement, backend=backend, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    _refuse("perplexity does not take", flags.given())
    with output.working(), Progress() as progress:
        from sparsify.text import default_evaluation_text, read_text

        if text is not None:
            source, why = read_text(text), f"evaluation text: {text}"
        else:
            source, why = default_evaluation_text(made_from(models[0]))
        progress.note(why)
        results = []
        for spec in models:
            loaded = load(
                spec, progress, dtype=dtype, placement=placement, backend=backend, trust_remote_code=trust_remote_code
            )
            windows = _windows(loaded, source, seq_len, stride, limit)
            measured = measure(
                loaded.model, windows, progress,
                label=Path(spec).name, protocol=protocol, batch_size=batch_size, only_dense=dense,
            )  # fmt: skip
            identity = {"checkpoint_sha256": identify(loaded.model)}
            results.append({"model": spec, "converted": loaded.converted} | identity | measured)
            del loaded
    result = {"text": why, "protocol": protocol, "models": results}
    output.emit(result, lambda console: _render(console, result))


def _refuse(said: str, flags: dict[str, object]) -> None:
    for name, value in flags.items():
        if value is not None and value is not False:
            raise SparsifyError(f"{said} {name}: leave it out, or {'add' if 'perplexity' in said else 'drop'} --tasks")


def _windows(loaded: Loaded, text: "Text", seq_len: int | None, stride: int | None, limit: int | None) -> "Windows":
    from sparsify.text import windows

    if seq_len is None:
        positions = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        seq_len = min(_LONGEST, positions) if isinstance(positions, int) else _LONGEST
    return windows(text, loaded.tokenizer, seq_len=seq_len, limit=limit, stride=stride)


def _render(console: Console, result: dict[str, Any]) -> None:
    # A table each: paths are long, and 80 columns few.
    columns = ("", "perplexity", "bits/byte", "nominal", "weighted", "realised", "bytes/token")
    for entry in result["models"]:
        table = make_table(escape(entry["model"]), *columns)
        sparse = entry.get("sparse")
        table.add_row("dense", *_quality(entry["dense"]), "-", "-", "-", byte_count(entry["dense_bytes_per_token"]))
        if sparse:
            shares = [percent(entry[f"{kind}_sparsity"]) for kind in ("nominal", "weighted", "realised")]
            table.add_row("sparse", *_quality(sparse), *shares, byte_count(entry["touched_bytes_per_token"]))
        console.print(table)
    seen = set()
    for entry in result["models"]:
        about = entry.get("sparse") or entry["dense"]
        line = (
            f"{about['text']}: {about['tokens']:,} tokens scored in {about['windows']} windows of {about['seq_len']}, "
            f"stride {about['stride']}. Protocol {about['protocol']}: {about['scored']}."
        )
        if line not in seen:
            console.print(line, markup=False)
        seen.add(line)


def _quality(measured: dict[str, Any]) -> tuple[str, str]:
    value = measured["perplexity"]
    return f"{value:.3f}" if value < 1e4 else f"{value:.2e}", f"{measured['bits_per_byte']:.4f}"
