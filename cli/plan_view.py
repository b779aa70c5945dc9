"""The plan of a conversion as tables and sentences."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsify.cli.ledger_view import print_left_dense
from sparsify.cli.output import byte_count, make_table, percent, seconds
from sparsify.cli.sites import sites_table

_KINDS = {
    "threshold": "thresholds",
    "scale": "score scales",
    "lr_a": "low-rank factors, right",
    "lr_b": "low-rank factors, left",
    "sparse_bias": "compensated biases",
    "rotation": "rotations",
}


def render_plan(console: Console, result: dict[str, Any]) -> None:
    """Prints what plan_settings found."""
    console.print(sites_table(result["kinds"]))
    print_left_dense(console, result["left_dense"])
    count = result["parameters"]
    console.print(
        f"{result['linears']} linears at {result['sites']} input sites, {percent(count['share'])} of "
        f"{count['all']:,} parameters; embeddings, norms and head stay dense. Read: {result['read_from']}, as "
        f"{result['dtype']}.",
        markup=False,
    )
    console.print(_checkpoint_table(result))
    console.print(_stages_table(result))
    _render_summary(console, result)


def _checkpoint_table(result: dict[str, Any]) -> Table:
    found = result["checkpoint"]
    table = make_table("The checkpoint", "", "at least", "at most")
    table.add_row("the dense model", *[byte_count(found["dense_bytes"])] * 2)
    for kind, sizes in found["added"].items():
        table.add_row(_KINDS[kind], *map(byte_count, sizes))
    table.add_row("config, ledger, card, tokenizer", *["about " + byte_count(found["beside_bytes"])] * 2)
    table.add_row("all", *map(byte_count, found["bytes"]), style="bold")
    return table


def _stages_table(result: dict[str, Any]) -> Table:
    memory, time = result["memory"]["stages"], result["time"]["stages"]
    table = make_table(f"Stages on {result['device']}: an estimate", "", "memory", "time")
    for name, duration in time.items():
        table.add_row(name, byte_count(memory.get(name)), seconds(duration))
    table.add_row("peak, sum", byte_count(result["memory"]["peak"]), seconds(result["time"]["seconds"]), style="bold")
    return table


def _render_summary(console: Console, result: dict[str, Any]) -> None:
    memory, time, verdict = result["memory"], result["time"], result["verdict"]
    how = f"{result['method']}, allocation {result['allocation']}" + (", rotated" if result["rotated"] else "")
    least, most = map(seconds, time["range"])
    said = [f"{how}: {least} to {most} at the speed measured just now."]
    if time["not_counted"]:
        said.append(f"Not counted: {', '.join(time['not_counted'])}.")
    streamed = memory["streamed_peak"]
    block_by_block = f"{byte_count(streamed)} block by block (--stream)" if streamed is not None else "no streaming"
    said.append(
        f"Memory: {byte_count(memory['peak'])} at the peak{_idle(memory)}, {block_by_block}; "
        f"{byte_count(memory['available'])} available on {memory['of']}. Disk: "
        f"{byte_count(result['checkpoint']['bytes'][1])}, {byte_count(result['checkpoint']['disk_free'])} free."
    )
    if result["unread"] is not None:
        said.append(f"Not checked, the text: {result['unread']}.")
    console.print(" ".join(said), markup=False)
    if verdict["fits"]:
        console.print("[bold]It fits here.[/] Nothing was read of the weights, and nothing was written.")
        return
    console.print(f"[bold]It does not fit here.[/] {escape(' '.join(verdict['said']))} Nothing was written.")


def _idle(memory: dict[str, Any]) -> str:
    idle = memory["peak"] - memory["needed"]
    return f" ({byte_count(idle)} of it file pages that the system can drop)" if idle > 0.01 * memory["peak"] else ""
