"""The generation check: agreement and repetition by hand, and the likelihood of what a model writes."""

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import sparsify
from sparsify.calibration import Calibration
from sparsify.errors import SparsifyError
from sparsify.evals.generation_check import (
    Continuations,
    GenerationSettings,
    compare_continuations,
    continue_greedily,
    cut_prompts,
    repetition,
)
from sparsify.runtime import dense
from sparsify.text import Windows


@pytest.fixture
def windows() -> Windows:
    tokens = torch.randint(3, 128, (5, 16), generator=torch.Generator().manual_seed(5))
    first = torch.ones(5, dtype=torch.int64)
    return Windows(tokens, first, torch.ones_like(tokens), 16, False, "offsets", "random tokens", "0" * 64)


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    # 1234 2341 3412 4123 1234: one of five stood before.
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 10) == pytest.approx(6 / 7)


def test_agreement_by_hand() -> None:
    settings = GenerationSettings(prompts=3, prompt_tokens=2, new_tokens=5)
    prompts = torch.zeros(3, 2, dtype=torch.int64)
    baseline = Continuations(prompts, torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [9, 9, 9, 9, 9]]), 0.0)
    other = Continuations(prompts, torch.tensor([[1, 2, 3, 4, 5], [1, 2, 0, 4, 5], [8, 9, 9, 9, 9]]), 700.0)
    found = compare_continuations(baseline, other, settings)
    assert (found["agreement"], found["never_parted"]) == (pytest.approx((5 + 2 + 0) / 3), 1)
    # Two 4-grams a row: 9999 twice in dense's last row.
    assert (found["repetition"], found["dense"]["repetition"]) == (0.0, pytest.approx(0.5 / 3))
    assert (found["dense"]["perplexity"], found["perplexity"]) == (1.0, float("inf"))
    assert found["settings"]["new_tokens"] == 5


def test_prompts_are_spread_over_the_text(windows: Windows) -> None:
    prompts = cut_prompts(windows, GenerationSettings(prompts=3, prompt_tokens=4))
    assert torch.equal(prompts, windows.tokens[[0, 2, 4], :4])
    assert cut_prompts(windows, GenerationSettings(prompts=1, prompt_tokens=64)).shape == (1, 16)


def test_greedy_and_scored_by_the_dense_model(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, windows: Windows
) -> None:
    model = sparsify.convert(tiny_llama, sparsify.Teal(sparsity=0.5), tiny_calibration)
    settings = GenerationSettings(prompts=5, prompt_tokens=6, new_tokens=12, batch_size=2)
    prompts = cut_prompts(windows, settings)
    found = continue_greedily(model, prompts, settings)
    every = prompts
    with torch.no_grad():
        for _ in range(12):
            every = torch.cat([every, model(input_ids=every).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(found.tokens, every[:, 6:])
        with dense(model):
            logits = model(input_ids=every).logits[:, 5:-1]
    expected = F.cross_entropy(logits.flatten(0, 1), every[:, 6:].flatten())
    assert found.nll_per_token == pytest.approx(float(expected), rel=1e-4)


def test_a_text_does_not_end(tiny_llama: PreTrainedModel, windows: Windows) -> None:
    settings = GenerationSettings(prompts=2, prompt_tokens=4, new_tokens=8)
    prompts = cut_prompts(windows, settings)
    free = continue_greedily(tiny_llama, prompts, settings)
    tiny_llama.generation_config.eos_token_id = int(free.tokens[0, 1])
    assert torch.equal(continue_greedily(tiny_llama, prompts, settings).tokens, free.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GenerationSettings(prompts=6), "6 prompts are asked for, random tokens gives 5 windows"),
        (GenerationSettings(prompts=0), "at least 1 prompt and 4 new tokens, not 0 and 128"),
        (GenerationSettings(prompts=2, new_tokens=3), "not 2 and 3"),
        (GenerationSettings(prompts=2, new_tokens=49), "65 tokens are more than this model's 64 positions"),
    ],
)
def test_settings_that_cannot_be_met(
    tiny_llama: PreTrainedModel, windows: Windows, settings: GenerationSettings, message: str
) -> None:
    with pytest.raises(SparsifyError, match=message):
        settings.check(tiny_llama, windows)
