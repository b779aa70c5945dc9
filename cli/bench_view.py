"""What `sparsify bench` says about its measurements: tables, and plain sentences about who is faster."""

from typing import Any

from rich.console import Console

from sparsify.cli.output import byte_count, make_table, percent

# Seconds of waiting in a second from which a measurement is called disturbed.
_BUSY = 0.05
_PATHS = {"native": ", native step", "graph": ", CUDA graphs"}


def statements(result: dict[str, Any]) -> list[str]:
    """Returns a sentence for each sparse side: which is faster, by how much, and why sparse is not where it is not."""
    return [_statement(result, name) for name, side in result["sides"].items() if side["sparse"]]


def cache_note(result: dict[str, Any]) -> str | None:
    """Returns a warning where the weights that a step touches may stay in the cache, None where none may."""
    fitting = [name for name, side in result["sides"].items() if side["fits_in_cache"]]
    if not fitting:
        return None
    largest = max(result["sides"][name]["touched"]["bytes_per_step"] for name in fitting)
    cache = f"the last-level cache of {byte_count(result['last_level_cache_bytes'])}"
    if len(fitting) == len(result["sides"]):
        return (
            f"The weights that a step touches ({byte_count(largest)}) fit in {cache}: this is the speed of the "
            "cache and not of memory, and a model that does not fit behaves differently."
        )
    return (
        f"Only the weights of {', '.join(fitting)} ({byte_count(largest)}) fit in {cache}: against the other sides, "
        "which read memory, the ratios are larger than those of a model that does not fit."
    )


def busy_note(result: dict[str, Any]) -> str | None:
    """Returns a warning where the measurement had to wait for CPUs, None where it did not or nobody knows."""
    waited = result["waited_for_cpu"]
    if waited is None or waited < _BUSY:
        return None
    return (
        f"The machine was busy: in a second of this measurement its threads waited {waited:.2f} s for a CPU. Other "
        "programs run here, or there are more threads than CPUs: measure again when it is quiet."
    )


def render_speed(console: Console, result: dict[str, Any]) -> None:
    """Prints the sides, their ratios, the sentences about them and how they were measured."""
    console.print(_sides(result))
    if len(result["sides"]) > 1:
        console.print(_ratios(result))
    for name, side in result["sides"].items():
        path = _PATHS.get(side["path"], "")
        console.print(f"{name}: {side['about']}{path}{_sparsities(side)}.", markup=False, style="dim")
    for name, reason in result["left_out"].items():
        console.print(f"{name} is left out: {reason}.", markup=False)
    if result["native_problem"]:
        step = "CUDA graphs" if "gpu" in result else "native step"
        console.print(f"No {step}: {result['native_problem']}.", markup=False)
    if result["random_weights"]:
        console.print("The weights are random: only speed and bytes mean something here, no quality does.")
    for note in filter(None, (busy_note(result), cache_note(result))):
        console.print(note)
    if result["statement"]:
        console.print(f"[bold]{result['statement']}[/]")
    console.print(_conditions(result), style="dim", markup=False)


def render_crossover(console: Console, result: dict[str, Any]) -> None:
    """Prints sparse against dense time by batch and sparsity, and where dense is faster."""
    cells: list[dict[str, Any]] = result["cells"]
    sparsities = sorted({cell["sparsity"] for cell in cells})
    title = f"Dense over sparse time, {result['linear']} {result['outputs']}×{result['inputs']}"
    table = make_table(title, "tokens", *(percent(s, 0) for s in sparsities), left=0)
    for batch in dict.fromkeys(cell["batch"] for cell in cells):
        row = sorted((c for c in cells if c["batch"] == batch), key=lambda cell: float(cell["sparsity"]))
        table.add_row(str(batch), *(f"{c['ratio']['median']:.2f}{_MARKS[c['faster']]}" for c in row))
    console.print(table)
    for batch in dict.fromkeys(cell["batch"] for cell in cells):
        console.print(_crossing(batch, [cell for cell in cells if cell["batch"] == batch]))
    if note := busy_note(result):
        console.print(note)
    stream = result["stream_gb_per_second"]["median"]
    console.print(
        f"{_machine(result)}, {result['dtype']}, {result['rounds']} rounds; weights out of memory, a stream reads "
        f"{stream:.1f} GB/s; inputs recorded from the model, dense is the fastest of torch and our own kernels.",
        style="dim",
        markup=False,
    )


_MARKS = {"sparse": "", "dense": " dense", "neither": " even"}


def _statement(result: dict[str, Any], name: str) -> str:
    side, best = result["sides"][name], result["best_dense"]
    ratio = result["ratios"][name][best]
    spread = f"{ratio['p10']:.2f} to {ratio['p90']:.2f} by round"
    sparse = f"sparse at {percent(side['touched']['realised_sparsity'], 0)}"
    if ratio["p10"] > 1.0:
        return (
            f"S{sparse[1:]} is faster here: {ratio['median']:.2f}× the tokens per second of the fastest dense side, "
            f"{best} ({spread})."
        )
    if ratio["p90"] >= 1.0:
        return (
            f"No clear difference here: {sparse} reaches {ratio['median']:.2f}× the fastest dense side, {best}, within "
            f"the spread of the rounds ({spread})."
        )
    reason = ""
    if result["backends"] == ["reference"]:
        reason = ": the reference backend masks the input but reads every weight byte"
    return (
        f"Dense is faster here: {sparse} reaches {ratio['median']:.2f}× the tokens per second of the fastest dense "
        f"side, {best} ({spread}){reason}."
    )


def _sides(result: dict[str, Any]) -> Any:
    step = "ms/token" if result["batch"] == 1 else "ms/step"
    table = make_table(result["title"], "", step, "p10 to p90", "tokens/s", "weights", "GB/s", "stream", left=1)
    table.columns[0].no_wrap = True
    for name, side in result["sides"].items():
        ms = side["ms_per_step"]
        table.add_row(
            name, f"{ms['median']:.2f}", f"{ms['p10']:.2f} to {ms['p90']:.2f}",
            f"{side['tokens_per_second']:.1f}", byte_count(side["touched"]["bytes_per_step"]),
            f"{side['gb_per_second']:.1f}", percent(side["share_of_stream"]["median"], 0),
        )  # fmt: skip
    return table


def _ratios(result: dict[str, Any]) -> Any:
    names = list(result["sides"])
    table = make_table("Times as fast, row over column", "", *names, left=1)
    for name in names:
        others = result["ratios"][name]
        table.add_row(name, *("" if other == name else f"{others[other]['median']:.2f}×" for other in names))
    return table


def _sparsities(side: dict[str, Any]) -> str:
    if not side["sparse"]:
        return ""
    touched = side["touched"]
    kinds = ("nominal", "weighted", "realised")
    return "; sparsity " + ", ".join(f"{kind} {percent(touched[f'{kind}_sparsity'])}" for kind in kinds)


def _conditions(result: dict[str, Any]) -> str:
    backend = f", backend {', '.join(result['backends'])}" if result["backends"] else ""
    prefill = f", {result['prefill']} prefill" if result["prefill"] else ""
    stream = result["stream"]
    return (
        f"{_machine(result)}, {result['dtype']}{backend}, batch {result['batch']}, "
        f"prompt {result['prompt_tokens']}{prefill}, {result['rounds']} rounds of {result['new_tokens']} steps; "
        f"a stream {stream['kind']} moves {stream['gb_per_second']['median']:.1f} GB/s. Protocol: {result['protocol']}."
    )


def _machine(result: dict[str, Any]) -> str:
    device = result["cpu"] if result["device"] == "cpu" else f"{result['device']} ({result['cpu']})"
    kernels = f", kernels {result['isa']}" if result["isa"] else ""
    return f"{device}, {result['threads']} thread{'s' if result['threads'] > 1 else ''}{kernels}"


def _crossing(batch: int, cells: list[dict[str, Any]]) -> str:
    def at(faster: str) -> str:
        return ", ".join(percent(cell["sparsity"], 0) for cell in cells if cell["faster"] == faster)

    said = [
        f"{words} at {at(faster)}"
        for faster, words in (
            ("dense", "dense is faster"),
            ("neither", "no clear difference"),
            ("sparse", "sparse is faster"),
        )
        if at(faster)
    ]
    tokens = "1 token" if batch == 1 else f"{batch} tokens at once"
    return f"{tokens}: {'; '.join(said)} (dense: {cells[0]['dense']})."
