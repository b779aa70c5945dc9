"""lm_eval's own model class on a converted model: at sparsity 0 its scores are the dense model's, at 0.5 they are not.

tests/test_other_tools.py runs the unmodified command; here both models are in this process, so that every digit counts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify

_PAIRS = [("def mean(values):", " return sum"), ("import", " os, sys"), ("", "class Line:")]


def _scores(model: Any, tokenizer: Any) -> list[tuple[float, bool]]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(_PAIRS)]
    scores: list[tuple[float, bool]] = evaluated.loglikelihood(requests, disable_tqdm=True)
    return scores


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scores_at_sparsity_0_are_the_dense_models(dtype: str, tiny_dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'sparsify-llm[eval]'")
    tokenizer = sparsify.load_tokenizer(str(tiny_dense))
    dense = _scores(sparsify.load_dense(str(tiny_dense), dtype=dtype), tokenizer)
    calibration = sparsify.Calibration(torch.randint(tokenizer.vocab_size, (4, 32)), "random tokens")
    found = {}
    for sparsity in (0.0, 0.5):
        model = sparsify.load_dense(str(tiny_dense), dtype=dtype)
        sparsify.convert(model, sparsify.RSparse(sparsity=sparsity), calibration)
        out = sparsify.save(model, tmp_path / str(sparsity), tokenizer)
        found[sparsity] = _scores(sparsify.load(out), tokenizer)
    assert found[0.0] == dense
    assert found[0.5] != dense
