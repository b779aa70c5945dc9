"""What a MODEL can be, and the one error that each of the others gets; no network is used."""

import importlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM

from sparsify import models
from sparsify.errors import CheckpointError, SparsifyError, UnavailableError
from sparsify.models import ALIASES, load_dense, load_tokenizer, parse_dtype, resolve_model

# The hub's library has used more than one httpx.
httpx: Any = importlib.import_module(huggingface_hub.errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

HUB_ID = "nobody/no-such-model"


class TestResolve:
    @pytest.mark.parametrize("alias", ALIASES)
    def test_aliases_are_hub_ids(self, alias: str) -> None:
        assert resolve_model(alias) == ALIASES[alias]
        assert ALIASES[alias].count("/") == 1
        assert alias == alias.lower()

    def test_reference_is_a_folder_of_the_package(self) -> None:
        assert Path(resolve_model("reference")).parent == Path(models.__file__).parent

    def test_hub_ids_pass_through(self) -> None:
        assert resolve_model(HUB_ID) == HUB_ID

    def test_folders_come_before_hub_ids(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "owner" / "name").mkdir(parents=True)
        (tmp_path / "owner" / "name" / "config.json").write_text("{}")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve_model("owner/name") == "owner/name"
        assert resolve_model("~/owner/name") == str(tmp_path / "owner" / "name")

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("llama-3-8", "unknown model 'llama-3-8'.*Did you mean 'llama-3-8b'"),
            ("Mistral-7B", "Did you mean 'mistral-7b'"),
            ("refrence", "Did you mean 'reference'"),
            ("zzz", "give a folder, a hub id .owner/name., or one of reference, llama-2-7b"),
            ("", "unknown model ''"),
            ("./not-here", "unknown model"),
            ("/not/here", "unknown model"),
            ("~/not-here", "unknown model"),
            ("a/b/c", "unknown model"),
            ("owner/", "unknown model"),
            ("owner/with space", "unknown model"),
        ],
    )
    def test_anything_else_is_refused(self, spec: str, message: str) -> None:
        with pytest.raises(SparsifyError, match=message) as refusal:
            resolve_model(spec)
        assert refusal.value.exit_code == 2

    def test_a_folder_without_a_model_and_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(SparsifyError, match=r"without a config\.json"):
            resolve_model(str(tmp_path))
        (tmp_path / "model.gguf").write_bytes(b"")
        with pytest.raises(SparsifyError, match="is a file: give the folder"):
            resolve_model(str(tmp_path / "model.gguf"))


class TestTheHub:
    """What the hub's library raises, in the chains of causes in which transformers passes it on."""

    @staticmethod
    def _response(status: int) -> Any:
        return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))

    @pytest.mark.parametrize("load", [load_dense, load_tokenizer])
    def test_offline_and_not_cached(self, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "create_connection", _no_network)
        with pytest.raises(UnavailableError, match=rf"hub was not reached.*{HUB_ID}.*HF_HUB_OFFLINE.*hf download"):
            load(HUB_ID)

    def test_gated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gated = GatedRepoError("401 Client Error.", response=self._response(401))
        _raise(monkeypatch, OSError("You are trying to access a gated repo.\nMake sure to have access."), cause=gated)
        with pytest.raises(UnavailableError, match=r"meta-llama/Llama-2-7b-hf is gated.*licence.*hf auth login"):
            load_dense("llama-2-7b")

    @pytest.mark.parametrize(
        "cause",
        [
            LocalEntryNotFoundError("We have no connection"),
            OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled."),
            httpx.ConnectError("[Errno -2] Name or service not known"),
            httpx.ConnectTimeout("timed out"),
            ConnectionResetError(104, "Connection reset by peer"),
        ],
        ids=lambda cause: type(cause).__name__,
    )
    def test_unreachable(self, cause: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        _raise(monkeypatch, OSError("We couldn't load the files."), cause=cause)
        with pytest.raises(UnavailableError, match=r"hub was not reached.*give the folder") as refusal:
            load_dense(HUB_ID)
        assert refusal.value.exit_code == 4

    def test_bare_connection_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _raise(monkeypatch, httpx.ConnectError("[Errno -2] Name or service not known"))
        with pytest.raises(UnavailableError, match="hub was not reached"):
            load_dense(HUB_ID)

    def test_trouble_at_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trouble = HfHubHTTPError("503 Server Error: busy", response=self._response(503))
        _raise(monkeypatch, trouble)
        with pytest.raises(UnavailableError, match=r"the hub did not give .*503.*try again"):
            load_dense(HUB_ID)

    def test_not_on_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = RepositoryNotFoundError("404 Client Error.", response=self._response(404))
        _raise(monkeypatch, OSError(f"{HUB_ID} is not a local folder"), cause=missing)
        with pytest.raises(SparsifyError, match=rf"{HUB_ID} is not on the hub.*check the name.*private") as refusal:
            load_dense(HUB_ID)
        assert refusal.value.exit_code == 2


class TestWhatCannotBeLoaded:
    def test_not_a_causal_language_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 32}))
        with pytest.raises(SparsifyError, match="could not be loaded as a causal language model"):
            load_dense(str(tmp_path))

    def test_quantised_by_another_tool(self, tmp_path: Path) -> None:
        config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(SparsifyError, match="is quantised"):
            load_dense(str(tmp_path))

    def test_remote_code_stays_off(self, tmp_path: Path) -> None:
        code = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "trap", "auto_map": code}))
        (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(SparsifyError):
            load_dense(str(tmp_path))
        assert not (tmp_path / "ran").exists()

    def test_no_weights(self, tiny_dense: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((tiny_dense / "config.json").read_bytes())
        with pytest.raises(SparsifyError, match=r"model\.safetensors"):
            load_dense(str(tmp_path))

    def test_no_tokenizer(self, tiny_dense: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((tiny_dense / "config.json").read_bytes())
        with pytest.raises(SparsifyError, match="tokenizer"):
            load_tokenizer(str(tmp_path))

    def test_a_device_that_is_not_here(self, tiny_dense: Path) -> None:
        with pytest.raises(UnavailableError, match="device 'cuda:99' cannot be used here"):
            load_dense(str(tiny_dense), device="cuda:99")

    def test_not_enough_memory(self, tiny_dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(UnavailableError, match=r"not enough memory.*--dtype bfloat16"):
            load_dense(str(tiny_dense))

    def test_a_bug_is_not_explained_away(self, tiny_dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("a bug")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(AssertionError):
            load_dense(str(tiny_dense))


class TestWhatIsLoaded:
    @pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
    def test_dtype(self, dtype: str, expected: torch.dtype, tiny_dense: Path) -> None:
        model = load_dense(str(tiny_dense), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert not model.training

    def test_unknown_dtype(self) -> None:
        with pytest.raises(SparsifyError, match=r"unknown dtype 'bfloat'.*Did you mean 'bfloat16'"):
            parse_dtype("bfloat")

    def test_a_converted_checkpoint_without_its_added_tensors(self, tiny_sparse: Path) -> None:
        model = load_dense(str(tiny_sparse))
        assert getattr(model.config, "quantization_config", None) is None
        assert not any("threshold" in name for name in model.state_dict())

    def test_missing_weights_are_an_error(self, tiny_dense: Path, tmp_path: Path) -> None:
        for path in tiny_dense.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        with pytest.raises(CheckpointError, match=r"no weight 'model\.layers\.2.* are missing"):
            load_dense(str(tmp_path))


def _raise(monkeypatch: pytest.MonkeyPatch, problem: Exception, cause: Exception | None = None) -> None:
    """Makes transformers fail with `problem`, caused by `cause`, where it reads a configuration."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise problem from cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)


def _no_network(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the test reached for the network")
