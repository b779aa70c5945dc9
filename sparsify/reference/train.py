"""Trains the bundled `reference` model: a small Llama on the standard library's own source.

    python -m sparsify.reference.train --out DIR            # the recipe behind the bundled weights
    python -m sparsify.reference.train --out DIR --steps 20 # a quick look

The tokenizer (byte-level BPE) is trained first, then the model with transformers' Trainer: AdamW,
warm-up, constant rate, linear decay. A killed run goes on from its last checkpoint with --resume; in the
constant phase --steps may be changed then, and the result is that of a run that was given it at the start.
Not covered: conversion and evaluation, which the `sparsify` command does.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
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
        model_max_length=2 * CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> torch.Tensor:
    """Returns the shuffled texts as one stream of token ids [N], each `<s> text </s>`."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    encoded = tokenizer([texts[i] for i in order], return_attention_mask=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def train(out: Path, *, steps: int, batch: int, learning_rate: float, seed: int, resume: bool, compiled: bool) -> None:
    set_seed(seed)
    texts = standard_library_text("training")
    tokenizer = train_tokenizer(texts)
    stream = pack(tokenizer, texts, seed)
    windows = Windows(stream, tokenizer.bos_token_id)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    size = sum(len(text.encode()) for text in texts)
    print(
        f"{len(texts)} modules, {size:,} bytes, {len(stream):,} tokens, {len(windows):,} windows, "
        f"{model.num_parameters():,} parameters"
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out / "training"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="warmup_stable_decay",
            warmup_steps=100,
            lr_scheduler_kwargs={"num_decay_steps": steps // 3, "decay_type": "1-sqrt", "min_lr_ratio": 0.0},
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            torch_compile=compiled,
            seed=seed,
            logging_steps=20,
            save_steps=100,
            save_total_limit=2,
            report_to="none",
            dataloader_num_workers=0,
        ),
        train_dataset=windows,
    )
    started = time.time()
    trainer.train(resume_from_checkpoint=resume)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record: dict[str, Any] = {
        "steps": steps,
        "tokens_per_step": batch * CONTEXT,
        "learning_rate": learning_rate,
        "seed": seed,
        "training_modules": len(texts),
        "training_bytes": size,
        "training_tokens": len(stream),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "last_run_seconds": round(time.time() - started),
        "loss": [[e["step"], round(e["loss"], 4)] for e in trainer.state.log_history if "loss" in e],
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and training.json")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (the last third decays the rate)")
    parser.add_argument("--batch", type=int, default=16, help=f"windows of {CONTEXT} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    args = parser.parse_args()
    train(
        args.out,
        steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        seed=args.seed,
        resume=args.resume,
        compiled=not args.no_compile,
    )


if __name__ == "__main__":
    main()
