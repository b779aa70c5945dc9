"""A decoder of the Llama kind as the native library's structs: pointers to the model's own tensors, no copy."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsify.kernels import library, native
from sparsify.kernels.native import checked
from sparsify.kernels.spec import SparseTensors
from sparsify.linear import SparseLinear
from sparsify.llama_like import Watch, problem_of
from sparsify.relu_layer import ReluUpLinear

_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def problem(model: PreTrainedModel) -> str | None:
    """Returns why the native decode step cannot run this model, in one line; None where it can."""
    if library.load() is None:
        return library.missing()
    return problem_of(
        model, device="cpu", dtypes=library.DTYPES, activations=library.ACTIVATIONS, backend=native.BACKEND.name
    )


class NativePlan:
    """The structs of one model, and what tells whether they still describe it.

    Raises SparsifyError for tensors that the kernels cannot take. Call `problem` first.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        model_: Any = model
        config = model_.config
        self.decoder: Any = model_.model
        self.dtype = model.dtype
        self._tensors: list[Tensor] = []
        # Linears of the structs whose bias is another one in a dense step: (struct, sparse bias, dense bias or None).
        self._biases: list[tuple[library.CLinear, int, int | None]] = []
        self._run_dense = False
        blocks = list(self.decoder.layers)[: config.num_hidden_layers]
        self.head_dim = int(blocks[0].self_attn.head_dim)
        self.blocks = (library.CBlock * len(blocks))()
        for block, c_block in zip(blocks, self.blocks, strict=True):
            self._fill(c_block, block)
        self.struct = library.CDecoder(
            dtype=library.DTYPES[model.dtype],
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=self.head_dim,
            inner=config.intermediate_size,
            vocabulary=model_.lm_head.out_features,
            blocks=len(blocks),
            activation=library.ACTIVATIONS[config.hidden_act],
            epsilon=self.decoder.norm.variance_epsilon,
            scaling=blocks[0].self_attn.scaling,
            embedding=self._pointer(self.decoder.embed_tokens.weight),
            norm=self._pointer(self.decoder.norm.weight),
            head=self._linear(model_.lm_head),
            block=self.blocks,
        )
        self.vocabulary = int(self.struct.vocabulary)
        kinds = DynamicCache(config=config).layers
        self.windows = [getattr(layer, "sliding_window", None) for layer in kinds]
        self._watch = Watch(model, self._tensors)

    def _fill(self, c_block: library.CBlock, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        modules = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
        for name, module in zip(_LINEARS, modules, strict=True):
            setattr(c_block, name, self._linear(module))
            if isinstance(module, SparseLinear) and module.sparse_bias is not None:
                dense = None if module.bias is None else self._pointer(module.bias)
                self._biases.append((getattr(c_block, name), self._pointer(module.sparse_bias), dense))
        if isinstance(mlp.up_proj, ReluUpLinear):
            c_block.cut = self._pointer(mlp.up_proj.cut)
        c_block.attention_norm = self._pointer(block.input_layernorm.weight)
        c_block.mlp_norm = self._pointer(block.post_attention_layernorm.weight)
        if hasattr(attention, "q_norm"):
            c_block.q_norm = self._pointer(attention.q_norm.weight)
            c_block.k_norm = self._pointer(attention.k_norm.weight)

    def _linear(self, module: nn.Module) -> library.CLinear:
        if isinstance(module, SparseLinear):
            tensors = module.tensors()
            found = checked(self.dtype, module.sparse_in, tensors)
            self._tensors += [t for t in vars(tensors).values() if isinstance(t, Tensor)]
            return found
        assert isinstance(module, nn.Linear)
        dense = SparseTensors(module.weight, module.bias, torch.zeros(()))
        found = checked(self.dtype, module.in_features, dense)
        found.threshold = None
        self._tensors += [t for t in (module.weight, module.bias) if t is not None]
        return found

    def _pointer(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def is_current(self) -> bool:
        """Whether the structs still describe the model."""
        return self._watch.is_current()

    def step(self, tokens: Tensor, cosine: Tensor, sine: Tensor, *, run_dense: bool) -> Tensor:
        """Returns the logits [B, 1, V] of one token [B, 1] each; keys and values are appended to the structs' cache.

        cosine and sine are [head_dim] in the model's dtype. Raises IndexError for a token outside of the vocabulary.
        """
        native = library.load()
        assert native is not None
        if run_dense != self._run_dense:
            self._run_dense = run_dense
            for linear, sparse, dense in self._biases:
                linear.bias = dense if run_dense else sparse
        flat = tokens.reshape(-1).to(torch.int64).contiguous()
        logits = torch.empty(len(flat), 1, self.vocabulary, dtype=self.dtype)
        status = native.sp_decode(
            ctypes.byref(self.struct),
            flat.data_ptr(),
            len(flat),
            cosine.data_ptr(),
            sine.data_ptr(),
            int(run_dense),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if status == library.NO_MEMORY:
            raise MemoryError("the native decode step got no work memory")
        if status:
            raise IndexError(f"a token of {flat.tolist()} is outside of the vocabulary of {self.vocabulary}")
        return logits
