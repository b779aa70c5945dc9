"""KL and agreement with the dense model: by hand, at zero, and on the tokens that a protocol scores."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

import sparsify
from sparsify.calibration import Calibration
from sparsify.evals.divergence import Divergence, compared
from sparsify.evals.perplexity import perplexity
from sparsify.runtime import dense
from sparsify.text import Windows


@pytest.fixture
def windows() -> Windows:
    tokens = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(5))
    # The second window scores its last five tokens only.
    scored_from = torch.tensor([1, 11, 1])
    return Windows(tokens, scored_from, torch.ones_like(tokens), 16, False, "offsets", "random tokens", "0" * 64)


@pytest.fixture
def converted(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> PreTrainedModel:
    return sparsify.convert(tiny_llama, sparsify.Teal(sparsity=0.5), tiny_calibration)


def test_by_hand() -> None:
    # p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 − 1/4 ln 2. The second row is equal to itself, shifted.
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]]).log() + torch.tensor([[0.0], [7.0]])
    kl, agreed = compared(p, q)
    assert kl == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert agreed == 1


def test_a_token_that_is_ruled_out_adds_nothing() -> None:
    p, q = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 0.0, -math.inf]])
    assert compared(p, q) == (0.0, 1)
    assert compared(p, torch.zeros(1, 3))[0] == pytest.approx(math.log(3 / 2))


@pytest.mark.parametrize("protocol", ["every-token", "decode"])
def test_of_the_dense_model_it_is_zero(converted: PreTrainedModel, windows: Windows, protocol: str) -> None:
    divergence = Divergence(converted, protocol)
    with dense(converted):
        quality = perplexity(converted, windows, protocol=protocol, batch_size=2, see=divergence.see)
    assert divergence.to_dict() == {"kl": 0.0, "top1_agreement": 1.0, "tokens": quality.tokens}


def test_of_a_sparse_model(tiny_llama: PreTrainedModel, tiny_calibration: Calibration, windows: Windows) -> None:
    original = copy.deepcopy(tiny_llama)
    model = sparsify.convert(tiny_llama, sparsify.Teal(sparsity=0.5), tiny_calibration)
    with dense(model):
        assert torch.equal(model(input_ids=windows.tokens).logits, original(input_ids=windows.tokens).logits)
    divergence = Divergence(model, "every-token")
    quality = perplexity(model, windows, batch_size=2, see=divergence.see)
    # The model as it was before the conversion, all windows at once, in fp64.
    with torch.no_grad():
        p = F.log_softmax(original(input_ids=windows.tokens).logits.double(), dim=-1)[:, :-1]
        q = F.log_softmax(model(input_ids=windows.tokens).logits.double(), dim=-1)[:, :-1]
    scored = windows.scored[:, 1:]
    expected = (p.exp() * (p - q)).sum(-1)[scored]
    found = divergence.to_dict()
    assert found["tokens"] == quality.tokens == len(expected) == 35
    assert found["kl"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found["kl"] > 0.01
    assert found["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1))[scored].double().mean()) < 1


def test_seeing_changes_no_perplexity(converted: PreTrainedModel, windows: Windows) -> None:
    divergence = Divergence(converted, "decode")
    seen = perplexity(converted, windows, protocol="decode", see=divergence.see)
    assert seen == perplexity(converted, windows, protocol="decode")
    assert divergence.tokens == seen.tokens < 35
