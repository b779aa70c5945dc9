"""Finetuning for activation sparsity: schedules, the L1 term, packed text, and transformers' Trainer around them."""
