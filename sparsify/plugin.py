"""Makes transformers' from_pretrained and save_pretrained understand converted checkpoints.

Imported while transformers itself is being imported, so it takes from transformers only what is there by then.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from sparsify import activations
from sparsify.config import QUANT_METHOD, SparsifyConfig
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.kernels import triton_backend
from sparsify.linear import SparsitySwitch, is_linear
from sparsify.mapped import MappedWeights
from sparsify.mlp_layer import place_neuron_layers
from sparsify.model_config import check_model_config
from sparsify.preflight import check_files, check_loaded
from sparsify.rectified import rectify_named
from sparsify.runtime import set_prefill, sparse_layers
from sparsify.token_layer import link_rotations, make_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# "dense" or "sparse": overrides a checkpoint's prefill policy where the command line of another tool cannot.
PREFILL_VARIABLE = "SPARSIFY_PREFILL"


class SparsifyQuantizer(HfQuantizer):
    """Replaces the linears that the configuration names before weights are read, and checks what was read."""

    quantization_config: SparsifyConfig
    # While the model is read in parts.
    _reading: RemovableHandle | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise SparsifyError(
                "from_pretrained does not convert a model: use sparsify.convert(model, method, calibration) "
                "or `sparsify convert`"
            )

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Checks the model's config before the model is built: transformers calls this there for another purpose."""
        check_model_config(config.to_dict())
        return config

    def update_ep_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The same place in transformers before 5.20, where update_attn_implementation is not called."""
        check_model_config(config.to_dict())
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        add_sparse_layers(model, config)
        rectify_named(model, model.config)
        if getattr(model.config, "distributed_config", None) is not None:
            # Here, not above: not every build of torch has torch.distributed.
            from sparsify.tensor_parallel import read_in_parts

            self._reading = read_in_parts(model, config.method)
        if kwargs.get("checkpoint_files"):
            check_files(kwargs["checkpoint_files"], model)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_loaded(model)
        if self._reading is not None:
            from sparsify.tensor_parallel import split_layers

            self._reading.remove()
            split_layers(model, self.quantization_config.method)
        mapped = MappedWeights()
        for name, layer in sparse_layers(model).items():
            if layer.lends_buffers and any(b is not None and b.is_meta for b in layer._buffers.values()):
                raise SparsifyError(
                    f"{name} is offloaded with its buffers, which other layers need: load the model without "
                    "offload_buffers=True"
                )
            loaded = layer.weight.data
            layer.bind()
            if layer.weight.data_ptr() != loaded.data_ptr():
                mapped.forget(loaded)
        set_prefill(model, os.environ.get(PREFILL_VARIABLE) or self.quantization_config.prefill)
        _decode_fast(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        # A prompt's choice is made in hooks, which a compiled forward does not run.
        neurons = self.quantization_config.neurons
        return neurons is None or neurons.cut != "prompt-top-k"


def register() -> None:
    """Registers with transformers, our activations too; a second call does nothing."""
    activations.register()
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(SparsifyConfig)
        register_quantizer(QUANT_METHOD)(SparsifyQuantizer)


def attach(model: PreTrainedModel, config: SparsifyConfig) -> None:
    """Marks a model converted in memory as from_pretrained would have, so that save_pretrained writes it whole."""
    register()
    marked = cast(Any, model)
    marked.config.quantization_config = config
    marked.config._is_quantized = True
    marked.hf_quantizer = SparsifyQuantizer(config, pre_quantized=True)
    marked.is_quantized = True
    marked.quantization_method = QUANT_METHOD
    set_prefill(model, config.prefill)
    for name, layer in sparse_layers(model).items():
        layer.density = config.linears[name].density
    _decode_fast(model)


def _decode_fast(model: PreTrainedModel) -> None:
    # Imported here: they need more of transformers than there is when this module is imported.
    from sparsify.native_decode import enable_where_possible

    enable_where_possible(model)
    if torch.cuda.is_available() and triton_backend.is_installed():
        from sparsify.gpu_decode import enable_on_gpu

        enable_on_gpu(model)


def add_sparse_layers(model: nn.Module, config: SparsifyConfig) -> None:
    """Replaces every linear that the configuration names by an unfitted sparse layer of its cut, rank and scale.

    Raises CheckpointError for a name that is not a linear of the model, a rank that its shape cannot have, a rotation
    of another width, or an MLP that is not one of the model's.
    """
    switch = SparsitySwitch()
    modules = dict(model.named_modules())
    for name, entry in config.linears.items():
        linear = modules.get(name)
        if linear is None or not is_linear(linear):
            found = "nothing" if linear is None else f"a {type(linear).__name__}"
            raise CheckpointError(
                f"quantization_config names the linear {name!r}, where {type(model).__name__} has {found}: "
                "the configuration is not this model's"
            )
        rows, columns = linear.weight.shape
        if entry.rank > min(rows, columns):
            raise CheckpointError(f"quantization_config gives {name} [{rows}, {columns}] the rank {entry.rank}")
        layer = make_layer(
            linear,
            cut=entry.cut,
            scaled=entry.scaled,
            rank=entry.rank,
            compensated=bool(entry.compensated),
            rotated=entry.rotation is not None,
            switch=switch,
        )
        layer.density = entry.density
        model.set_submodule(name, layer)
    if config.neurons is not None:
        place_neuron_layers(model, config.neurons)
    rotations = {name: entry.rotation for name, entry in config.linears.items() if entry.rotation is not None}
    layers = sparse_layers(model)
    for name, owner in rotations.items():
        widths = [layers[n].sparse_in for n in (name, owner)]
        if widths[0] != widths[1]:
            raise CheckpointError(f"quantization_config turns {name} of {widths[0]} inputs as {owner} of {widths[1]}")
    link_rotations(layers, rotations)


# Importing this module first imports the table of quantizers, whose hook finds it half-imported and leaves it to this.
register()
