"""`sparsify inspect MODEL --neurons TEXT`: zeros, dead neurons and co-activation of the MLPs, layer by layer."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparsify.cli.loading import identify, load
from sparsify.cli.output import Output, common_prefix, make_table, percent
from sparsify.cli.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsify.cli.loading import Loaded
    from sparsify.text import Windows

# What looks at a text run: enough tokens for histograms, few enough for a minute.
WINDOWS, WINDOW = 8, 512


def positions_of(model: "PreTrainedModel") -> int:
    """Returns how many tokens the model takes; our longest window where it does not say."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else WINDOW


def load_with_windows(model: str, text: str, progress: Progress, trust_remote_code: bool) -> "tuple[Loaded, Windows]":
    """Loads a model, and reads a text in windows that fit it. Raises as both do; the text, which is quick, first."""
    from sparsify.text import read_text, windows

    source = read_text(text)
    loaded = load(model, progress, trust_remote_code=trust_remote_code)
    length = min(WINDOW, positions_of(loaded.model))
    return loaded, windows(source, loaded.tokenizer, seq_len=length, limit=WINDOWS)


def inspect_neurons(model: str, text: str, output: Output, trust_remote_code: bool) -> None:
    """Collects and emits what the neurons of a dense or converted model do on a text."""
    with output.working(), Progress() as progress:
        from sparsify.evals.machine import environment
        from sparsify.evals.neuron_activity import neuron_activity

        loaded, cut = load_with_windows(model, text, progress, trust_remote_code)
        found = [asdict(mlp) for mlp in neuron_activity(loaded.model, cut, progress)]
        about = {"model": model, "converted": loaded.converted}
        if loaded.converted:
            about["checkpoint_sha256"] = identify(loaded.model)
        result = about | {
            "text": cut.name, "text_sha256": cut.sha256, "windows": len(cut.tokens), "seq_len": cut.seq_len,
            "mlps": found, "mean_zeros": sum(mlp["zeros"] for mlp in found) / len(found),
            "dead": sum(mlp["dead"] for mlp in found), "neurons": sum(mlp["neurons"] for mlp in found),
        } | environment(loaded.model.device)  # fmt: skip
    output.emit(result, lambda console: _render(console, result))


def _render(console: Console, result: dict[str, Any]) -> None:
    prefix = common_prefix([mlp["mlp"] for mlp in result["mlps"]])
    title = f"Neurons of {prefix.rstrip('.')}" if prefix else "Neurons"
    table = make_table(title, "MLP", "neurons", "zeros (AP)", "dead", "lift", "partner", "repeated")
    for mlp in result["mlps"]:
        lift = "-" if mlp["lift"] is None else f"{mlp['lift']:.2f}"
        table.add_row(
            mlp["mlp"].removeprefix(prefix), str(mlp["neurons"]), percent(mlp["zeros"]), str(mlp["dead"]), lift,
            percent(mlp["partner"]), percent(mlp["repeated"]),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{result['windows']} × {result['seq_len']} tokens of {result['text']}: {percent(result['mean_zeros'])} of "
        f"down's inputs are 0, the dynamic dead-neuron rate; {result['dead']} of {result['neurons']} neurons are off "
        "for every token. lift: how much more often two neurons are on together than by chance; partner: how often a "
        "neuron's closest one is on with it; repeated: neurons of a token that were on for the one before.",
        markup=False,
    )
