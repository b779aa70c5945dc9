"""Tools that never heard of sparsify, on a converted checkpoint: plain from_pretrained, unmodified lm_eval."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sparsify

_DOCUMENTS = ["the cat sat on the mat", "a dog sat on a log", "the dog and the cat sat"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, converted at 50%, with a tokenizer of whole words."""
    torch.manual_seed(0)
    words = ["<unk>", "<s>", *sorted({word for document in _DOCUMENTS for word in document.split()})]
    vocabulary = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<s>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=1,
            initializer_range=0.5,
        )
    )
    tokens = torch.randint(len(words), (4, 16))
    sparsify.convert(model, sparsify.Teal(sparsity=0.5), sparsify.Calibration(tokens, "random tokens"))
    return sparsify.save(model, tmp_path_factory.mktemp("checkpoint") / "tiny", fast)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task of lm_eval over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in _DOCUMENTS))
    (folder / "local.yaml").write_text(
        "task: local\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}\n"
        "test_split: test\n"
        "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\n'
        'doc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}]\n"
    )
    return folder


def _environment(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "SPARSIFY_AUTOLOAD"} | changes


@pytest.mark.parametrize(("autoload", "sparse"), [("1", 14), ("0", 0)], ids=["installed", "switched-off"])
def test_plain_from_pretrained(checkpoint: Path, autoload: str, sparse: int) -> None:
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})\n"
        "print(sum(type(module).__name__ == 'SparseLinear' for module in model.modules()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=_environment(SPARSIFY_AUTOLOAD=autoload),
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{sparse}\n", done.stderr


def _word_perplexity(checkpoint: Path, tasks: Path, out: Path, *command: str, kind: str, autoload: str) -> float:
    """Runs lm_eval on the local task in a fresh process and returns what it measured."""
    options = ["--model", kind, "--model_args", f"pretrained={checkpoint},dtype=float32", "--device", "cpu"]
    options += ["--include_path", str(tasks), "--tasks", "local", "--batch_size", "1", "--output_path", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", *command, *options],
        env=_environment(SPARSIFY_AUTOLOAD=autoload, HF_HOME=str(out / "cache")),
        cwd=tasks,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (written,) = (path for path in out.rglob("results*.json"))
    return float(json.loads(written.read_text())["results"]["local"]["word_perplexity,none"])


def _expected(checkpoint: Path) -> tuple[float, float]:
    """Returns the perplexity per word of the sparse and of the dense model, as the task defines it."""
    model = sparsify.load(checkpoint, dtype="float32")
    tokenizer = sparsify.load_tokenizer(str(checkpoint))
    texts = [torch.tensor([[1, *tokenizer.encode(text, add_special_tokens=False)]]) for text in _DOCUMENTS]

    def perplexity() -> float:
        with torch.inference_mode():
            losses = [float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) for ids in texts]
        return math.exp(sum(losses) / sum(len(text.split()) for text in _DOCUMENTS))

    sparse = perplexity()
    with sparsify.dense(model):
        return sparse, perplexity()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kind", "autoload"),
    [
        (("lm_eval",), "hf", "1"),
        (("sparsify.cli.main", "exec", "--", "lm_eval"), "hf", "0"),
        (("sparsify.cli.main", "exec", "--", "lm_eval"), "sparsify", "0"),
    ],
    ids=["installed", "exec", "exec-model-type"],
)
def test_unmodified_lm_eval_measures_the_sparse_model(
    command: tuple[str, ...], kind: str, autoload: str, checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'sparsify-llm[eval]'")
    sparse, dense = _expected(checkpoint)
    assert abs(sparse / dense - 1) > 0.01
    # fp32 sums in another order; and the JSON carries every digit.
    measured = _word_perplexity(checkpoint, tasks, tmp_path, *command, kind=kind, autoload=autoload)
    assert measured == pytest.approx(sparse, rel=1e-4)
