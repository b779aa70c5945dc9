"""Trains the bundled `reference` model: a small Llama on the standard library's own source.

    python -m sparsify.reference.train --out DIR  # the recipe behind the bundled weights
    python -m sparsify.reference.train --out DIR --steps 20 --decay-steps 20  # a quick look

The tokenizer (byte-level BPE) is trained first, then the model with transformers' Trainer and AdamW in two stages: a
constant rate on all training modules, then a falling rate on those that are not tests, which read more like a
library. A killed run goes on from its last checkpoint with --resume.
Not covered: conversion and evaluation, which the `sparsify` command does.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sparsify.corpus import standard_library_text

VOCABULARY = 4096
CONTEXT = 512
SHAPE: dict[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 5,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
}


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of CONTEXT tokens over the packed stream, each with BOS first, as evaluation makes them."""

    def __init__(self, stream: torch.Tensor, bos: int) -> None:
        count = len(stream) // (CONTEXT - 1)
        body = stream[: count * (CONTEXT - 1)].view(count, CONTEXT - 1)
        self.windows = torch.cat([torch.full((count, 1), bos), body], dim=1)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of VOCABULARY tokens that puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> torch.Tensor:
    """Returns the shuffled texts as one stream of token ids [N], each `<s> text </s>`."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    encoded = tokenizer([texts[i] for i in order], return_attention_mask=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def train_stage(
    model: LlamaForCausalLM,
    windows: Windows,
    folder: Path,
    *,
    settings: dict[str, Any],
    start: Path | None = None,
    resume: bool,
) -> Path:
    """Trains the model for settings["max_steps"] and returns the last checkpoint, whose optimizer the next stage takes.

    With resume, goes on from the folder's newest checkpoint, or takes the last one where the stage was finished.
    """
    last = folder / f"checkpoint-{settings['max_steps']}"
    if resume and last.is_dir():
        load_model(model, last / "model.safetensors", strict=False)
        return last
    arguments = TrainingArguments(
        output_dir=str(folder),
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        save_steps=100,
        save_total_limit=2,
        report_to="none",
        dataloader_num_workers=0,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=windows)
    if start is not None:
        state = torch.load(start / "optimizer.pt", weights_only=True)
        trainer.create_optimizer().load_state_dict(state)
    trainer.train(resume_from_checkpoint=resume and any(folder.glob("checkpoint-*")))
    return last


def train(
    out: Path,
    *,
    steps: int,
    decay_steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    resume: bool,
    compiled: bool,
) -> None:
    """Trains tokenizer and model and writes them with training.json, the record of the run, to `out`."""
    set_seed(seed)
    texts = standard_library_text("training")
    tokenizer = train_tokenizer(texts)
    stream = pack(tokenizer, texts, seed)
    library = pack(tokenizer, standard_library_text("library"), seed)
    bos = tokenizer.bos_token_id
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    size = sum(len(text.encode()) for text in texts)
    print(
        f"{len(texts)} modules, {size:,} bytes, {len(stream):,} tokens, {len(library):,} of them not tests, "
        f"{model.num_parameters():,} parameters"
    )
    shared = {
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "torch_compile": compiled,
    }
    constant = {"max_steps": steps, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 100}
    decay = {"max_steps": decay_steps, "lr_scheduler_type": "linear"}
    first = train_stage(model, Windows(stream, bos), out / "training", settings=shared | constant, resume=resume)
    second = train_stage(
        model, Windows(library, bos), out / "decay", settings=shared | decay, start=first, resume=resume
    )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record: dict[str, Any] = {
        "steps": steps,
        "decay_steps": decay_steps,
        "tokens_per_step": batch * CONTEXT,
        "learning_rate": learning_rate,
        "seed": seed,
        "training_modules": len(texts),
        "training_bytes": size,
        "training_tokens": len(stream),
        "library_tokens": len(library),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "loss": _losses(first, 0) + _losses(second, steps),
    }
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def _losses(checkpoint: Path, offset: int) -> list[list[float]]:
    history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [[offset + entry["step"], round(float(entry["loss"]), 4)] for entry in history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and training.json")
    parser.add_argument("--steps", type=int, default=1000, help="steps at the constant rate, on all training modules")
    parser.add_argument("--decay-steps", type=int, default=800, help="steps with a falling rate, without the tests")
    parser.add_argument("--batch", type=int, default=16, help=f"windows of {CONTEXT} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    args = parser.parse_args()
    train(
        args.out,
        steps=args.steps,
        decay_steps=args.decay_steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        seed=args.seed,
        resume=args.resume,
        compiled=not args.no_compile,
    )


if __name__ == "__main__":
    main()
