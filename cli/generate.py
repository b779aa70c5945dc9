"""`sparsify generate`: the continuation of a prompt, dense and sparse side by side."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from sparsify.cli.loading import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    PrefillOption,
    TrustOption,
    load,
)
from sparsify.cli.output import Format, FormatOption, Output, SaveOption, visible
from sparsify.cli.placement import DeviceMapOption, MaxMemoryOption, OffloadFolderOption, Placement
from sparsify.cli.progress import Progress


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("generate", rich_help_panel="Make and measure")(generate)


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A converted checkpoint, or a dense model.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, the same for both sides.")] = 0,
    prefill: PrefillOption = None,
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
    """Continue a prompt, dense and sparse side by side.

    Says how many tokens both sides share before they part. A dense model is
    continued alone.

    [dim]$[/] sparsify generate reference-50 --prompt "def mean(values):"
    """
    output = Output(format, save)
    placement = Placement(device, device_map, max_memory, offload_folder)
    with output.working(), Progress() as progress:
        from sparsify.evals.generation import side_by_side

        loaded = load(
            model, progress, dtype=dtype, placement=placement, backend=backend, prefill=prefill,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        progress.note(f"writing {max_new_tokens} tokens")
        written = side_by_side(
            loaded.model, loaded.tokenizer, prompt,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
    result = {"model": model} | written.to_dict()
    output.emit(result, lambda console: _render(console, result))


def _render(console: Console, result: dict[str, Any]) -> None:
    for name in ("dense", "sparse"):
        run = result[name]
        if run is None:
            continue
        text = Text(visible(result["prompt"]), style="dim").append(visible(run["text"]), style="not dim")
        speed = f"{len(run['tokens'])} tokens, {run['tokens_per_second']:.1f} tokens/s"
        console.print(Panel(text, title=f"[bold]{name}[/]", subtitle=speed, title_align="left", subtitle_align="right"))
    if result["sparse"] is not None:
        longest = max(len(result["dense"]["tokens"]), len(result["sparse"]["tokens"]))
        agreed = result["agreement"]
        same = "All" if agreed == longest else f"The first {agreed} of"
        console.print(f"{same} {longest} tokens are the same. Prefill {result['prefill']}; speeds are single runs.")
