"""The model card of a finetuned checkpoint: what it is, how it was trained, its curves, what was measured."""

from typing import Any

from sparsify.cli.output import percent

CURVES = "training.png"
_IS = {
    "prosparse": "with ReLU in its MLPs, trained for zeros by ProSparse (arXiv 2402.13516)",
    "relu": "with ReLU in its MLPs, trained without an L1 term",
    "dense": "trained on: the baseline of a finetuning for sparsity, with nothing made sparse",
}


def render_card(name: str, result: dict[str, Any]) -> str:
    """Returns README.md."""
    spec, settings, method = result["model"], result["settings"], result["method"]
    lines = [
        "---",
        "library_name: transformers",
        *(["tags: [sparsify, activation-sparsity]"] if method != "dense" else ["tags: [sparsify]"]),
        *([f"base_model: {spec}"] if "/" in spec and not spec.startswith(("/", ".")) else []),
        "---",
        f"# {name}",
        "",
        f"`{spec.rstrip('/').rpartition('/')[2]}` {_IS[method]}. An ordinary checkpoint: nothing but transformers is "
        "needed to load it.",
        *([f"`sparsify convert {name} --method relu --cut {result['shift']:g}` makes its zeros save weights."]
          if method != "dense" else []),
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in _training(result, settings)),
        "",
        *_measured(result["measured"]),
        f"![loss and sparsity over the tokens]({CURVES})",
        "",
        "Made by `sparsify finetune --config finetune.yaml`; every logged step is in training.json.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _training(result: dict[str, Any], settings: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (
            "tokens",
            f"{result['tokens']:,} of {settings['text']}, {result['steps']:,} steps, {settings['context']} a window",
        ),
        ("learning rate", f"{settings['learning_rate']:g}, {settings['lr_schedule']}, AdamW, {settings['precision']}"),
    ]
    if result["method"] == "prosparse":
        written = result["stages"]
        stages = ", ".join(
            f"{factor:g} at {end}" for end, factor in zip(written["ends"], written["factors"], strict=True)
        )
        rows.append(("λ of the L1 term", f"{stages}; reduction {settings['l1_reduction']}"))
    if settings["distillation"]:
        teacher = settings["teacher"] or "the model before"
        rows.append(("distillation", f"weight {settings['distillation']:g}, teacher {teacher}"))
    if settings["lora_rank"]:
        rows.append(("LoRA", f"rank {settings['lora_rank']}, merged"))
    return rows


def _measured(measured: dict[str, Any] | None) -> list[str]:
    if measured is None:
        return ["Nothing was measured when this checkpoint was written.", ""]
    before, after = measured["before"], measured["after"]
    rows = [("before", before["perplexity"], None)]
    if not measured["shifts"]:
        rows.append(("after", after["perplexity"], None))
    for point in measured["shifts"]:
        name = "after" if point["shift"] == 0.0 else f"after, activations up to {point['shift']:g} cut"
        rows.append((name, point["perplexity"], point["mean"]))
    return [
        "| | perplexity | zeros that enter down |",
        "|---|---|---|",
        *(f"| {name} | {value:.3f} | {percent(zeros)} |" for name, value, zeros in rows),
        "",
        f"On {before['windows']} × {before['seq_len']} tokens of {before['text']}, {before['dtype']}; zeros are the "
        "mean over layers and tokens.",
        "",
    ]
