"""A loaded checkpoint takes its weights once: the peak of a fresh process that loads and decodes, on Linux."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sparsify
from sparsify.evals.shapes import sparse_random_model
from sparsify.kernels import library

_PROGRAM = """
import json, sys
import torch, sparsify, transformers.models.llama.modeling_llama

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

before = status("VmRSS")
model = sparsify.load(sys.argv[1])
model.generate(torch.arange(16)[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"weights": weights, "peak": status("VmHWM") - before}))
"""
# The interpreter's own growth while it runs a model for the first time: imports, threads, work memory.
_OWN = 60 << 20


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's /proc")
@pytest.mark.skipif(library.load() is None, reason=str(library.missing()))
def test_loading_and_decoding_hold_one_copy_of_the_weights(tmp_path: Path) -> None:
    folder = sparsify.save(sparse_random_model("llama-100m", 0.5), tmp_path / "sparse")
    done = subprocess.run([sys.executable, "-c", _PROGRAM, str(folder)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["weights"] > 190e6
    assert found["peak"] <= 1.15 * found["weights"] + _OWN
