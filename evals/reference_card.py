"""Measures the bundled `reference` model against xz and writes its card and loss curve beside its weights.

    python -m sparsify.evals.reference_card --model DIR   # DIR holds the weights and training.json

Needs matplotlib (the `report` extra) for the curve. Not covered: sparsity, which `sparsify eval` measures.
"""

import argparse
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.calibration import hooked, run_batches
from sparsify.corpus import EVALUATION_MODULES
from sparsify.evals.perplexity import Perplexity, perplexity
from sparsify.models import load_dense, load_tokenizer
from sparsify.targets import find_targets
from sparsify.text import read_text, windows

_SEQ_LEN = 512
_PROMPTS = (
    "def read_lines(path):",
    'class Stack:\n    """A last-in, first-out collection."""\n\n    def __init__(self',
    "import unittest\n\nclass TestCounter(unittest.TestCase):\n\n    def test_",
)


def xz_bits_per_byte(documents: list[str]) -> float:
    """Returns the bits per byte of `xz -9` on all documents as one stream, which lets it match across them."""
    data = "".join(documents).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def input_statistics(model: PreTrainedModel, tokens: Tensor) -> dict[str, tuple[float, float, float]]:
    """Returns by linear, over tokens [N, S]: largest |x| / rms, kurtosis, mean |channel mean| / channel deviation.

    A normal input has a kurtosis of 3 and channel means near 0.
    """
    modules = {name: model.get_submodule(name) for name in find_targets(model, tokens[:1, :8]).names}
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    with hooked(modules, lambda name, x: seen[name].append(x.reshape(-1, x.shape[-1]).double())):
        run_batches(model, tokens, "statistics", None)
    return {name: _statistics(torch.cat(parts)) for name, parts in seen.items()}


def _statistics(x: Tensor) -> tuple[float, float, float]:
    rms = x.square().mean().sqrt()
    centred = x - x.mean()
    kurtosis = centred.pow(4).mean() / centred.square().mean().square()
    shift = (x.mean(0).abs() / x.std(0)).mean()
    return float(x.abs().max() / rms), float(kurtosis), float(shift)


def render(
    record: Mapping[str, Any],
    result: Perplexity,
    xz: float,
    statistics: Mapping[str, tuple[float, float, float]],
    samples: Mapping[str, str],
    parameters: int,
) -> str:
    """Returns the card in Markdown."""
    ratio = result.bits_per_byte / xz
    rows = [f"| {n.split('layers.')[-1]} | {a:.0f} | {k:.0f} | {m:.2f} |" for n, (a, k, m) in statistics.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "# reference",
            "",
            f"A small Llama ({parameters:,} parameters, bf16) trained on the source of Python's standard library. It "
            "is the model that sparsify's demo and tests run on: real weights, real activations, nothing to download.",
            "",
            "| | |",
            "|---|---|",
            "| architecture | Llama: RMSNorm, SwiGLU, RoPE, grouped-query attention 10/5, tied embeddings, "
            "5 layers, hidden 320, FFN 864, byte-level BPE of 4,096 tokens |",
            f"| training text | {record['training_modules']:,} modules of CPython {record['python']}'s standard "
            f"library and its tests, {record['training_bytes']:,} bytes, {record['training_tokens']:,} tokens |",
            f"| held out | {len(EVALUATION_MODULES)} modules for evaluation, others for calibration, and the tests of "
            "all of them: see `sparsify/corpus.py` |",
            f"| training | {record['steps']:,} steps of {record['tokens_per_step']:,} tokens at a constant rate of "
            f"{record['learning_rate']}, then {record['decay_steps']:,} with a linearly falling rate on the "
            f"{record['library_tokens']:,} tokens that are not tests; {_tokens_seen(record) / 1e6:.1f} M tokens seen, "
            f"AdamW, bf16 autocast, torch {record['torch']} |",
            f"| perplexity on the evaluation modules | {result.perplexity:.2f} per token "
            f"({result.tokens:,} tokens, windows of {result.seq_len}, BOS first) |",
            f"| bits per byte | **{result.bits_per_byte:.3f}** ; `xz -9` on the same text as one stream: {xz:.3f} "
            f"(ratio {ratio:.2f}) |",
            "",
            "![loss curve](loss.svg)",
            "",
            "Made by `python -m sparsify.reference.train --out DIR`, described by "
            "`python -m sparsify.evals.reference_card --model DIR`. Another Python version trains on another version "
            "of the modules.",
            "",
            "## What its activations look like",
            "",
            "Inputs of its linears on held-out text. A normal input has a kurtosis of 3 and channel means near 0; "
            "trained language models have neither.",
            "",
            "| linear | largest / rms | kurtosis | mean / deviation of a channel |",
            "|---|---|---|---|",
            *rows,
            "",
            "## What it writes",
            "",
            "64 tokens from the first lines, sampled at temperature 0.7 and top-p 0.9, seed 0:",
            "",
            *[line for text in samples.values() for line in ("```python", text.rstrip(), "```", "")],
            "## Limits",
            "",
            "It knows Python's surface and the standard library's habits, nothing else; its programs look right and "
            "are not. It was trained on windows of 512 tokens and loses its thread beyond them. It fits into a CPU's "
            "cache: neither its speed nor what sparsity costs it says much about large models.",
            "",
        ]
    )


def _tokens_seen(record: Mapping[str, Any]) -> int:
    return int((record["steps"] + record["decay_steps"]) * record["tokens_per_step"])


def continue_sampled(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt")
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "pad_token_id": tokenizer.eos_token_id}
    output = model.generate(**ids, max_new_tokens=64, **settings)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def draw_loss(record: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sparsify"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([step for step, _ in record["loss"]], [loss for _, loss in record["loss"]], linewidth=1)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(2, 6))
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    folder: Path = parser.parse_args().model
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    model, tokenizer = load_dense(str(folder)), load_tokenizer(str(folder))
    text = read_text("stdlib:evaluation")
    result = perplexity(model, windows(text, tokenizer, seq_len=_SEQ_LEN))
    xz = xz_bits_per_byte(text.documents)
    tokens = windows(text, tokenizer, seq_len=_SEQ_LEN, limit=8).tokens
    samples = {prompt: continue_sampled(model, tokenizer, prompt) for prompt in _PROMPTS}
    card = render(record, result, xz, input_statistics(model, tokens), samples, model.num_parameters())
    (folder / "README.md").write_text(card, encoding="utf-8")
    draw_loss(record, folder / "loss.svg")
    print(f"{result.bits_per_byte:.4f} bits per byte, xz -9 {xz:.4f}, ratio {result.bits_per_byte / xz:.3f}")


if __name__ == "__main__":
    main()
