"""A plain transformers knows sparsify checkpoints after installation, and nothing of it can break `import torch`."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

_REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as found; print('sparsify' in found)"


@pytest.fixture(autouse=True)
def _installed() -> None:
    points = importlib.metadata.entry_points(group="torch.backends")
    assert "sparsify" in points.names, "the tests need the package installed: pip install -e ."


def _python(*lines: str, options: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh process, away from the checkout; the test fails where it does."""
    env = {name: value for name, value in os.environ.items() if name != "SPARSIFY_AUTOLOAD"} | environment
    done = subprocess.run(
        [sys.executable, *options, "-c", "\n".join(lines)], env=env, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


# The orders in which a program can come to torch, the quantizers and the models.
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM",
        "from transformers import LlamaForCausalLM",
        "import torch, transformers.quantizers.auto",
        "import transformers.quantizers.auto, transformers.modeling_utils",
        "import transformers.modeling_utils",
    ],
)
def test_plain_transformers_has_sparsify_registered(first: str) -> None:
    done = _python(first, _REGISTERED)
    assert done.stdout == "True\n"
    assert done.stderr == ""


def test_import_torch_alone_imports_no_transformers_and_leaves_one_hook() -> None:
    done = _python(
        "import sys, torch, sparsify",
        "sparsify.autoload.install()",
        "print('transformers' in sys.modules, 'sparsify.plugin' in sys.modules)",
        "print(sum(type(finder).__name__ == '_TransformersHook' for finder in sys.meta_path))",
    )
    assert done.stdout == "False False\n1\n"


def test_hook_goes_away_and_leaves_the_modules_their_own_loader() -> None:
    done = _python(
        "import sys, torch, transformers.modeling_utils, transformers.quantizers.auto as auto",
        "print(type(auto.__loader__).__name__, type(auto.__spec__.loader).__name__)",
        "print(any(type(finder).__name__ == '_TransformersHook' for finder in sys.meta_path))",
        "import sparsify; sparsify.autoload.install()",
    )
    assert done.stdout == "SourceFileLoader SourceFileLoader\nFalse\n"


def test_switched_off_by_the_environment_until_imported() -> None:
    done = _python(
        "import sys",
        "from transformers import AutoModelForCausalLM",
        _REGISTERED,
        "print('sparsify' in sys.modules)",
        "import sparsify",
        _REGISTERED,
        SPARSIFY_AUTOLOAD="0",
    )
    assert done.stdout == "False\nFalse\nTrue\n"


@pytest.mark.parametrize("missing", ["sparsify.plugin", "sparsify.autoload", "sparsify"])
def test_a_broken_installation_does_not_break_torch_or_transformers(missing: str) -> None:
    # -W error: not even where warnings are errors.
    done = _python(
        f"import sys; sys.modules[{missing!r}] = None",
        "import torch",
        "from transformers import AutoModelForCausalLM",
        "import transformers.modeling_utils",
        "print(torch.ones(2).sum().item())",
        options=("-W", "error::RuntimeWarning", "-W", "error::UserWarning"),
    )
    assert done.stdout == "2.0\n"
    assert "sparsify" in done.stderr


def test_a_plugin_that_raises_does_not_break_torch_or_transformers() -> None:
    done = _python(
        "import sys, types",
        "plugin = sys.modules['sparsify.plugin'] = types.ModuleType('sparsify.plugin')",
        "def register(): raise RuntimeError('no such table')",
        "plugin.register = register",
        "from transformers import AutoModelForCausalLM",
        "import transformers.modeling_utils",
        "print('fine')",
    )
    assert done.stdout == "fine\n"
    assert "could not register with transformers (RuntimeError: no such table)" in done.stderr


def test_entry_point_takes_milliseconds() -> None:
    done = _python(
        "import os, time, torch, sparsify_autoload",
        "del os.environ['SPARSIFY_AUTOLOAD']",
        "start = time.process_time(); sparsify_autoload.install(); print(time.process_time() - start)",
        SPARSIFY_AUTOLOAD="0",
    )
    # Seconds of CPU, a few thousandths here; the bound leaves room for slow machines.
    assert float(done.stdout) < 0.2
