"""Dense checkpoints of ReLU-fied models: no sparse layers, and a card that says what loads them.

`relu` and `relu2` are transformers' own: an ordinary folder. `fatrelu` is written as MiniCPM-S-1B has it, which vLLM
runs: hidden_act "fatrelu" with hidden_act_param, and for a Llama without biases the architecture MiniCPMForCausalLM,
whose three scales are set to 1, because vLLM's Llama takes SiLU only. The others have names that sparsify registers.
"""

import json
import math
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsify.activations import FATRELU_CUT
from sparsify.errors import SparsifyError
from sparsify.models import quiet
from sparsify.new_folder import new_folder
from sparsify.relufication import Parts, Relufication
from sparsify.strict import read_json

_STOCK = ("relu", "relu2")


def check_plain(model: PreTrainedModel, how: Relufication, parts: Parts) -> None:
    """Raises SparsifyError where a dense checkpoint could not be loaded again."""
    if how.activation != "fatrelu":
        return
    for mlp in parts.mlps:
        holder = model.get_submodule(mlp.activation.rpartition(".")[0])
        if not hasattr(holder, "config"):
            raise SparsifyError(
                f"a dense checkpoint with fatrelu has its cut in config.json, and {type(holder).__name__} of "
                f"{type(model).__name__} does not read that: leave --plain out, for sparse layers with the cut"
            )


def save_plain(
    model: PreTrainedModel,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    how: Relufication,
    source: str,
    said: str,
) -> None:
    """Writes the folder `out`. Raises SparsifyError where it exists, UnavailableError where it cannot be written."""
    with new_folder(out) as folder:
        with quiet():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for_vllm = how.activation == "fatrelu" and _is_plain_llama(model)
        if for_vllm:
            _name_for_vllm(folder / "config.json")
        card = _CARD.format(name=out.name, source=source, said=said, loads=_loads(how, for_vllm))
        (folder / "README.md").write_text(card, encoding="utf-8")


_CARD = """---
library_name: transformers
---

# {name}

{source} with {said}.

{loads} `sparsify inspect {name} --neurons TEXT` says how many zeros there are.
"""


def _loads(how: Relufication, for_vllm: bool) -> str:
    skips = "`--method relu` of `sparsify convert` makes its zeros save weights."
    if how.hidden_act in _STOCK:
        return f"An ordinary checkpoint: nothing but transformers is needed to load it. {skips}"
    if how.activation == "fatrelu":
        where = (
            "vLLM loads it as MiniCPMForCausalLM, whose FATReLU it is"
            if for_vllm
            else "vLLM has FATReLU in MiniCPMForCausalLM only, and this is another architecture"
        )
        return (
            f'Its activation is `hidden_act: "fatrelu"` with `{FATRELU_CUT}`. {where}; transformers loads it after '
            f"`import sparsify`, and stops at the unknown name without. {skips}"
        )
    loader = "sparsify.load_dense" if how.after_norms or how.activation == "drelu" else "transformers"
    return (
        f"Its activation `{how.hidden_act}` is sparsify's: after `import sparsify` {loader} loads it; without sparsify "
        "transformers stops at the unknown name."
    )


def _is_plain_llama(model: PreTrainedModel) -> bool:
    config: Any = model.config
    if type(model) is not LlamaForCausalLM or config.attention_bias or config.mlp_bias:
        return False
    return bool(config.head_dim * config.num_attention_heads == config.hidden_size)


def _name_for_vllm(path: Path) -> None:
    """Says in config.json that the Llama is a MiniCPM with all scales at 1: embedding, residuals, head."""
    config = read_json(path)
    config |= {
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 1.0,
        "scale_depth": math.sqrt(config["num_hidden_layers"]),
        "dim_model_base": config["hidden_size"],
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
