"""Named model shapes with random weights, for measurements of speed where no trained model is at hand.

The shapes are real models'; the weights are seeded normal numbers that keep the activations finite through every
block. What such a model says means nothing: speed, bytes and numerics can be measured on it, quality cannot.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config
from transformers.initialization import no_init_weights

from sparsify.calibration import Calibration, ScoreHistogram, hooked, run_batches
from sparsify.conversion import convert
from sparsify.errors import SparsifyError, suggest
from sparsify.methods import get_method
from sparsify.methods.teal import Teal
from sparsify.runtime import sparse_layers
from sparsify.targets import find_targets, linear_shapes

_BIAS_STD = 0.02
# Scores of attention with a standard deviation of 2: peaked as a trained model's. At 1 they average over the context,
# and the tokens of a deep block become alike.
_SHARPER = {"q_proj.weight": 2**0.5, "k_proj.weight": 2**0.5}

SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama-100m": (
        LlamaConfig,
        {
            "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        },
    ),
    # https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/config.json
    "qwen-0.5b": (
        Qwen2Config,
        {
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
        },
    ),
    # https://huggingface.co/TinyLlama/TinyLlama_v1.1/blob/main/config.json
    "tinyllama-1.1b": (
        LlamaConfig,
        {
            "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
            "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        },
    ),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json, without its scaled rotation
    "llama-3.2-1b": (
        LlamaConfig,
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
        },
    ),
    # https://huggingface.co/meta-llama/Llama-3.2-3B/blob/main/config.json, without its scaled rotation
    "llama-3.2-3b": (
        LlamaConfig,
        {
            "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
        },
    ),
    # https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json; its positions are 4096: longer here, so
    # that a context of 4096 tokens can be followed by more.
    "llama-2-7b": (
        LlamaConfig,
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        },
    ),
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
    "llama-3-8b": (
        LlamaConfig,
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip


def shape_config(name: str) -> PreTrainedConfig:
    """Returns a new configuration of a named shape. Raises SparsifyError for an unknown name."""
    if name not in SHAPES:
        raise SparsifyError(f"unknown shape {name!r}: known are {', '.join(SHAPES)}.{suggest(name, SHAPES)}")
    kind, values = SHAPES[name]
    return kind(**values)


def random_model(
    name: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Returns the shape as a model in evaluation mode, made on the device; the same weights for the same seed, dtype
    and kind of device.

    Matrices are normal with the standard deviation inputs^-½ (0.022 at 2048), so that products neither grow nor
    vanish; norms and embeddings have the size 1. They are filled in place in dtype: no second copy is ever held.
    """
    config = shape_config(name)
    with no_init_weights(), torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()
    _fill(model, torch.Generator(device).manual_seed(seed))
    loaded: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
    return loaded


def random_tokens(model: PreTrainedModel, windows: int, length: int, *, seed: int = 0) -> Tensor:
    """Returns token ids [windows, length] (int64), uniform over the model's vocabulary."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed))


def random_calibration(model: PreTrainedModel, windows: int = 4, length: int = 128, *, seed: int = 0) -> Calibration:
    """Returns random tokens as a calibration."""
    return Calibration(random_tokens(model, windows, length, seed=seed), "random tokens")


def sparse_random_model(
    name: str,
    sparsity: float,
    method: str = "teal",
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Returns random_model converted at one sparsity, calibrated on 4 × 128 random tokens.

    Raises SparsifyError for an unknown shape or method, or a sparsity that the method cannot meet.
    """
    configured = get_method(method).configure(sparsity=sparsity)
    model = random_model(name, dtype=dtype, seed=seed, device=device)
    return convert(model, configured, random_calibration(model, seed=seed))


def teal_thresholds(
    model: PreTrainedModel, calibration: Calibration, sparsities: Iterable[float], *, skip: int = 0
) -> dict[float, dict[str, float]]:
    """Returns TEAL's threshold of every linear at every sparsity, from one pass over a dense model.

    With skip 0 they are the ones that `convert` fits. skip leaves out the first positions of each window: attention
    averages over few random tokens there, so its outputs are larger than those that a later decode step sees.
    """
    targets = find_targets(model, calibration.tokens[:1, :8])
    histograms = {site.names[0]: ScoreHistogram() for site in targets.sites}

    def see(name: str, x: Tensor) -> None:
        histograms[name].add(x[:, skip:])

    with hooked({name: model.get_submodule(name) for name in histograms}, see):
        run_batches(model, calibration.tokens, "calibrate", None)
    site_of = {name: histograms[site.names[0]] for site in targets.sites for name in site.names}
    shapes = linear_shapes(model, targets)
    return {
        sparsity: {
            name: site_of[name].threshold(Teal(sparsity).candidates(name, shape)[0].density)
            for name, shape in shapes.items()
        }
        for sparsity in sparsities
    }


def set_thresholds(model: PreTrainedModel, thresholds: Mapping[str, float], density: float | None = None) -> None:
    """Writes the thresholds into a converted model's layers in place, so one copy of the weights serves many.

    density: the share of channels that they keep, by which kernels choose their form.
    """
    for name, layer in sparse_layers(model).items():
        layer.threshold.fill_(thresholds[name])
        layer.density = layer.density if density is None else density


def save_random(name: str, folder: str | Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Writes random_model as a Hugging Face folder with a tokenizer of bytes, for commands that take a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = random_model(name, dtype=dtype, seed=seed)
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model.config.bos_token_id, model.config.eos_token_id = 0, 1
    model.save_pretrained(folder)
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def _fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if parameter is embedding:
            parameter.normal_(generator=generator)
        elif parameter.dim() > 1:
            sharper = _SHARPER.get(".".join(name.split(".")[-2:]), 1.0)
            parameter.normal_(0.0, sharper * parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, _BIAS_STD, generator=generator)
        else:
            parameter.fill_(1.0)
