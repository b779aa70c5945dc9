"""The tables of `sparsify measure`."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsify.cli.output import common_prefix, make_table, percent, seconds


def print_ppl_p(console: Console, result: dict[str, Any]) -> None:
    """Prints the points, the layers of the first few, and how it was measured."""
    dense, natural = result["dense"], result["natural"]
    unit = "neurons" if result["scope"] == "mlp" else "channels"
    setting = {"cett": "CETT", "top-k": "dropped", "fatrelu": "ε", "zero": ""}
    table = make_table(
        escape(f"{result['model']}: {result['metric']}"),
        "p",
        "rule",
        "sparsity",
        "perplexity",
        "rise",
        "setting",
        left=2,
    )
    table.add_row("-", "dense", percent(0.0), _perplexity(dense["perplexity"]), "-", "-")
    for point in result["points"]:
        shown = f"{setting[point['rule']]} {point['setting']:.4g}" if point["rule"] != "zero" else "-"
        table.add_row(
            "-" if point["p"] is None else f"{100 * point['p']:g}%", point["rule"], percent(point["sparsity"], 2),
            _perplexity(point["perplexity"]), percent(point["rise"], 3), shown,
        )  # fmt: skip
    console.print(table)
    console.print(_layers_table(result))
    console.print(
        f"Sparsity: 1 − the mean activation ratio over {len(natural['layers'])} layers and all tokens of the sparse "
        f"run. Perplexity on {dense['tokens']:,} tokens of {dense['text']} in {dense['windows']} windows of "
        f"{dense['seq_len']}, every token sparse; CETT on {result['cett_text']['tokens']:,} tokens of "
        f"{result['cett_text']['text']}. In the dense model {percent(natural['zero_ratio'])} of inputs and "
        f"{percent(natural['dynamic_dead_rate'])} of activations are 0 (dynamic dead neuron rate); "
        f"{natural['static_dead']:,} of {natural['neurons']:,} {unit} are 0 on every token (static). "
        f"{result['cett_passes']} passes for CETT, {result['perplexities']} perplexities.",
        markup=False,
    )
    for statement in result["left_out"]:
        console.print(f"Not measured: {statement}.", markup=False)
    if "out" in result:
        console.print(f"[bold]Wrote {escape(result['out'])}[/] in {seconds(result['seconds'])}.")


def _layers_table(result: dict[str, Any]) -> Table:
    """Returns the activation ratio of every layer at every point, beside what is zero in the dense model."""
    shared = common_prefix([layer["name"] for layer in result["natural"]["layers"]])
    points = result["points"][:4]
    names = ["natural" if point["p"] is None else f"{100 * point['p']:g}%" for point in points]
    headings = [f"{point['rule']}\n{name}" for point, name in zip(points, names, strict=True)]
    title = "Activation ratio by layer" + (f", the first {len(points)}" if len(result["points"]) > len(points) else "")
    table = make_table(title, f"{shared}*", "zeros", "always 0", *headings)
    for index, layer in enumerate(result["natural"]["layers"]):
        ratios = [percent(point["layers"][index]["activation_ratio"]) for point in points]
        table.add_row(
            layer["name"].removeprefix(shared), percent(layer["zero_ratio"]), str(layer["static_dead"]), *ratios
        )
    return table


def _perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1e4 else f"{value:.2e}"
