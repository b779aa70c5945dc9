"""GRIFFIN against its paper's definition in plain loops, and whose neurons are whose."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import sparsify
from sparsify import Calibration, Griffin, SparsifyError
from sparsify.calibration import hooked
from sparsify.evals.perplexity import perplexity
from sparsify.evals.realised import RealisedDensity
from sparsify.runtime import set_prefill, sparse_layers
from sparsify.text import Text, windows

MLP = "model.layers.3.mlp"
DOWN = f"{MLP}.down_proj"


@pytest.fixture(scope="module")
def converted(trained: PreTrainedModel, trained_calibration: Calibration) -> PreTrainedModel:
    """The reference model at 40%; to be read only."""
    return sparsify.convert(copy.deepcopy(trained), Griffin(sparsity=0.4), trained_calibration)


@pytest.fixture
def griffin(tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> Any:
    """tiny_llama at 50%."""
    return sparsify.convert(tiny_llama, Griffin(sparsity=0.5), tiny_calibration)


@pytest.fixture
def prompts(tiny_calibration: Calibration) -> Tensor:
    """Two prompts of 12 tokens."""
    return tiny_calibration.tokens[:2, :12]


def _continued(model: Any, prompt: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    """Returns the logits [B, S, V] of tokens [B, S], one at a time after the prompt."""
    with torch.inference_mode():
        cache = model(prompt, use_cache=True, **options).past_key_values
        mask = options.get("attention_mask")
        logits = []
        for index in range(tokens.shape[1]):
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                options["attention_mask"] = mask
            logits.append(model(tokens[:, index : index + 1], past_key_values=cache, **options).logits)
    return torch.cat(logits, dim=1)


class TestAgainstThePaper:
    def test_neurons_and_output_on_real_activations(
        self, converted: PreTrainedModel, trained: PreTrainedModel, trained_calibration: Calibration
    ) -> None:
        window = trained_calibration.tokens[:1, :65]
        z: list[Tensor] = []
        with torch.no_grad(), hooked({DOWN: trained.get_submodule(DOWN)}, lambda _, x: z.append(x[0])):
            trained(window[:, :64], use_cache=False)
        scores = [0.0] * z[0].shape[1]
        for row in z[0].double().tolist():
            norm = math.sqrt(sum(value**2 for value in row))
            for j, value in enumerate(row):
                scores[j] += (value / norm) ** 2
        s = [math.sqrt(score) for score in scores]
        k = round(converted.config.quantization_config.linears[DOWN].density * len(s))
        assert float(sparse_layers(converted)[DOWN].threshold) == k
        chosen = sorted(range(len(s)), key=lambda j: -s[j])[:k]

        mlp: Any = converted.get_submodule(MLP)
        seen: list[tuple[Tensor, Tensor]] = []
        handle = mlp.register_forward_hook(lambda _, args, y: seen.append((args[0][0], y[0])))
        _continued(converted, window[:, :64], window[:, 64:])
        handle.remove()
        x, found = (tensor[0].double() for tensor in seen[-1])
        gate, up, down = (layer.weight.detach().double() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        expected = torch.zeros_like(found)
        for i in chosen:
            g = float(gate[i] @ x)
            expected += down[:, i] * (g / (1.0 + math.exp(-g))) * float(up[i] @ x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_the_prompt_runs_dense(
        self, converted: PreTrainedModel, trained: PreTrainedModel, trained_calibration: Calibration
    ) -> None:
        tokens = trained_calibration.tokens[:2, :32]
        with torch.no_grad():
            assert torch.equal(converted(tokens).logits, trained(tokens).logits)


class TestWhoseNeurons:
    def test_a_prompt_knows_nothing_of_the_one_before(self, griffin: Any, prompts: Tensor) -> None:
        tokens = prompts[:1, :4]
        alone = [_continued(copy.deepcopy(griffin), prompts[i : i + 1], tokens) for i in (0, 1)]
        assert not torch.equal(*alone)
        for i in (0, 1, 0):
            assert torch.equal(_continued(griffin, prompts[i : i + 1], tokens), alone[i])

    def test_two_caches_that_take_turns(self, griffin: Any, prompts: Tensor) -> None:
        tokens = prompts[:1, :4]
        alone = [_continued(griffin, prompts[i : i + 1], tokens) for i in (0, 1)]
        with torch.inference_mode():
            caches = [griffin(prompts[i : i + 1], use_cache=True).past_key_values for i in (0, 1)]
            for step in range(4):
                for i, cache in enumerate(caches):
                    token = tokens[:, step : step + 1]
                    assert torch.equal(griffin(token, past_key_values=cache).logits[:, 0], alone[i][:, step])

    def test_a_copied_cache_keeps_its_choice_and_a_reset_one_does_not(self, griffin: Any, prompts: Tensor) -> None:
        first, second = prompts[:1], prompts[1:]
        with torch.inference_mode():
            cache = griffin(first, use_cache=True).past_key_values
            copied = copy.deepcopy(cache)
            expected = griffin(second[:, :1], past_key_values=cache).logits
            assert torch.equal(griffin(second[:, :1], past_key_values=copied).logits, expected)
            cache = DynamicCache(config=griffin.config)
            griffin(first, past_key_values=cache)
            cache.reset()
            griffin(second, past_key_values=cache)
            found = griffin(first[:, :1], past_key_values=cache).logits
        assert torch.equal(found, _continued(griffin, second, first[:, :1]))

    def test_sequences_of_a_batch_have_their_own(self, griffin: Any, prompts: Tensor) -> None:
        tokens = prompts[:, :4]
        together = _continued(griffin, prompts, tokens)
        for i in (0, 1):
            alone = _continued(griffin, prompts[i : i + 1], tokens[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)

    def test_padding_has_no_part(self, griffin: Any, prompts: Tensor) -> None:
        short, tokens = prompts[:1, 5:], prompts[:1, :3]
        expected = _continued(griffin, short, tokens)
        padded = torch.cat([torch.full((1, 5), 77), short], dim=1)
        batch, mask = torch.cat([padded, prompts[1:]]), torch.ones(2, 12, dtype=torch.int64)
        mask[0, :5] = 0
        output = griffin.generate(short, max_new_tokens=6, do_sample=False)
        both = griffin.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(both[0, 12:], output[0, 7:])
        counted = _continued(griffin, batch, tokens.expand(2, -1), attention_mask=mask)
        unmasked = _continued(griffin, batch, tokens.expand(2, -1), attention_mask=torch.ones_like(mask))
        assert not torch.allclose(unmasked[:1], expected, atol=1e-3)
        # Rotary positions are relative: only the distances count.
        torch.testing.assert_close(counted[:1], expected, rtol=1e-3, atol=1e-3)

    def test_beams_share_their_prompts_choice(self, griffin: Any, prompts: Tensor) -> None:
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
        together = griffin.generate(prompts, **options)
        for i in (0, 1):
            alone = griffin.generate(prompts[i : i + 1], **options)[0]
            assert torch.equal(together[i, : len(alone)], alone)
        assert len({tuple(row) for row in together.tolist()}) == 2

    def test_a_prompt_in_pieces_is_the_same_prompt(self, griffin: Any, prompts: Tensor) -> None:
        whole = griffin.generate(prompts, max_new_tokens=6, do_sample=False)
        pieces = griffin.generate(prompts, max_new_tokens=6, do_sample=False, prefill_chunk_size=5)
        assert torch.equal(whole, pieces)

    def test_a_prompt_of_one_token_runs_dense(self, griffin: Any, prompts: Tensor) -> None:
        token = prompts[:1, :1]
        with torch.no_grad(), RealisedDensity(griffin) as realised:
            found = griffin(token, use_cache=True)
            with sparsify.dense(griffin):
                assert torch.equal(griffin(token).logits, found.logits)
            assert "model.layers.0.mlp.down_proj" not in realised.densities()
            griffin(token, past_key_values=found.past_key_values)
        assert realised.densities()["model.layers.0.mlp.down_proj"] < 1.0

    def test_an_error_leaves_nothing_behind(self, griffin: Any, prompts: Tensor) -> None:
        expected = _continued(griffin, prompts, prompts[:, :2])
        with pytest.raises(IndexError), torch.no_grad():
            griffin(torch.tensor([[5, 10_000]]))
        assert griffin.prompt_choices.prompt is None
        assert torch.equal(_continued(griffin, prompts, prompts[:, :2]), expected)


class TestRefusals:
    def test_other_sequences_on_a_cache(self, griffin: Any, prompts: Tensor) -> None:
        with torch.inference_mode():
            cache = griffin(prompts, use_cache=True).past_key_values
            cache.batch_select_indices(torch.tensor([0]))
            with pytest.raises(SparsifyError, match="1 sequences run on the cache of 2 prompts"):
                griffin(prompts[:1, :1], past_key_values=cache)

    def test_tokens_without_a_prompt(self, griffin: Any, prompts: Tensor) -> None:
        with torch.no_grad():
            with sparsify.dense(griffin):
                # Past the model's own forward, which is where a prompt is noticed.
                cache = griffin.model(prompts, use_cache=True).past_key_values
            with pytest.raises(
                SparsifyError, match=r"no prompt has chosen neurons for these tokens: .*--protocol decode"
            ):
                griffin(prompts[:, :1], past_key_values=cache)
            set_prefill(griffin, "sparse")
            with pytest.raises(SparsifyError, match="no prompt has chosen neurons"):
                griffin(prompts)

    def test_a_mask_that_does_not_say_what_is_padding(self, griffin: Any, prompts: Tensor) -> None:
        mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
        with torch.no_grad(), pytest.raises(SparsifyError, match="attention mask of two dimensions"):
            griffin(prompts, attention_mask=mask)

    def test_every_token(self, griffin: Any) -> None:
        text = windows(Text("numbers", ("12 34 " * 40,)), sparsify.load_tokenizer("reference"), seq_len=8, limit=2)
        text = type(text)(**{**vars(text), "tokens": text.tokens % 100})
        with pytest.raises(SparsifyError, match=r"protocol every-token has no prompt.* use --protocol decode"):
            perplexity(griffin, text)
        with sparsify.dense(griffin):
            dense = perplexity(griffin, text)
        assert not dense.sparse
        assert perplexity(griffin, text, protocol="decode").sparse

    @pytest.mark.parametrize("allocation", ["greedy", "sensitivity"])
    def test_other_allocations(
        self, tiny_llama: PreTrainedModel, tiny_calibration: Calibration, allocation: str
    ) -> None:
        with pytest.raises(SparsifyError, match=f"allocation {allocation} .* method griffin"):
            sparsify.convert(tiny_llama, Griffin(sparsity=0.3), tiny_calibration, allocation=allocation)
        assert not sparse_layers(tiny_llama)

    def test_a_budget_that_pays_for_no_neuron(self, tiny_llama: PreTrainedModel, tiny_calibration: Calibration) -> None:
        dense, mlp = 2 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96), 2 * 4 * 3 * 64 * 96
        largest = math.floor((mlp * 95 / 96 - 24) / dense * 1e4) / 1e4
        with pytest.raises(
            SparsifyError, match=f"sparsity 0.9 cannot be met by method griffin: .* at most {largest} is"
        ):
            sparsify.convert(tiny_llama, Griffin(sparsity=0.9), tiny_calibration)
        sparsify.convert(tiny_llama, Griffin(sparsity=largest), tiny_calibration)
        assert float(sparse_layers(tiny_llama)["model.layers.0.mlp.down_proj"].threshold) == 1.0

    @pytest.mark.parametrize("sparsity", [1.0, 50, float("nan"), "0.5"])
    def test_bad_sparsity(self, sparsity: object) -> None:
        with pytest.raises(SparsifyError, match="sparsity is"):
            Griffin(sparsity=sparsity)  # type: ignore[arg-type]


def test_decode_protocol_is_a_prompt_and_its_continuation(
    converted: PreTrainedModel, trained_calibration: Calibration
) -> None:
    tokens = trained_calibration.tokens[:2, :32]
    one_by_one = _continued(converted, tokens[:, :16], tokens[:, 16:])
    cache = DynamicCache(config=converted.config)
    model: Any = converted
    with torch.inference_mode(), RealisedDensity(converted) as realised:
        with sparsify.dense(converted):
            model(tokens[:, :16], past_key_values=cache)
        set_prefill(converted, "sparse")
        at_once = model(tokens[:, 16:], past_key_values=cache).logits
    set_prefill(converted, "dense")
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-3, atol=1e-3)
    ledger = sparsify.ledger_of(converted)
    assert ledger.with_densities(realised.densities()).weighted_sparsity == pytest.approx(ledger.weighted_sparsity)


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_the_budget_is_of_all_linears(
    tiny_llama: PreTrainedModel, tiny_calibration: Calibration, sparsity: float
) -> None:
    sparsify.convert(tiny_llama, Griffin(sparsity=sparsity), tiny_calibration)
    ledger = sparsify.ledger_of(tiny_llama)
    # One neuron more in each of the two MLPs would be too many.
    neuron = 2 * 3 * 64 * 4 / ledger.dense_bytes
    assert sparsity - 1e-12 <= ledger.weighted_sparsity < sparsity + neuron
    for linear in ledger.linears:
        assert linear.density == 1.0 if "self_attn" in linear.name else (linear.density * 96).is_integer()


def test_it_comes_back_bit_equal(tiny_dense: Path, tmp_path: Path) -> None:
    model: Any = sparsify.load_dense(str(tiny_dense))
    calibration = Calibration(torch.randint(model.config.vocab_size, (4, 32)), "random tokens")
    sparsify.convert(model, Griffin(sparsity=0.5), calibration)
    prompt, tokens = calibration.tokens[:2, :10], calibration.tokens[:2, 10:14]
    expected = _continued(model, prompt, tokens)
    folder = sparsify.save(model, tmp_path / "griffin")
    assert sparsify.verify(folder) == []
    for loaded in (sparsify.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(_continued(loaded, prompt, tokens), expected)
        assert loaded.config.quantization_config.prefill == "dense"
        assert loaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert torch.equal(
        _continued(sparsify.load(folder, dense=True), prompt, tokens),
        _continued(sparsify.load_dense(str(tiny_dense)), prompt, tokens),
    )
