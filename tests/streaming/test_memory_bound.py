"""The peak of a process that converts a model of many blocks: a constant and the largest two blocks, on Linux."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Resident memory of its own: the process before it converts anything is subtracted.
_PROGRAM = """
import json, sys
import torch, sparsify, transformers.models.llama.modeling_llama
from sparsify.streaming.conversion import convert_streamed

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

folder, out, how = sys.argv[1:]
calibration = sparsify.Calibration(torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0)), "random")
before = status("VmRSS")
if how == "streamed":
    convert_streamed(folder, out, sparsify.Teal(sparsity=0.5), calibration)
else:
    model = sparsify.load_dense(folder)
    sparsify.save(sparsify.convert(model, sparsify.Teal(sparsity=0.5), calibration), out)
print(json.dumps(status("VmHWM") - before))
"""
_BLOCKS, _WIDTH, _INNER = 10, 1024, 6144
# The interpreter's own growth while it runs a model for the first time, and pieces of files.
_OWN = 90 << 20


def _peak(folder: Path, out: Path, how: str) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(folder), str(out), how],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's /proc")
def test_streaming_holds_two_blocks_and_a_constant(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=_WIDTH, intermediate_size=_INNER, num_hidden_layers=_BLOCKS,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.arange(parameter.numel()).remainder(127).sub(63).mul(1e-3).reshape(parameter.shape)
            parameter.copy_(values)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.save_pretrained(tmp_path / "dense")
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    del model
    assert weights > 9 * block > 9 * 40e6
    streamed = _peak(tmp_path / "dense", tmp_path / "streamed", "streamed")
    assert streamed < 2 * block + _OWN
    # What the bound would not let pass.
    assert _peak(tmp_path / "dense", tmp_path / "whole", "whole") > weights > 2 * block + _OWN
    assert (tmp_path / "streamed" / "model.safetensors").stat().st_size == (
        tmp_path / "whole" / "model.safetensors"
    ).stat().st_size
