"""One decode step of a Llama-like model on the GPU: seven launches a block, nothing that the host has to wait for.

    norm → q|k|v → attention (rotation, append, softmax) → o → add, norm → gate|up → down (act · up where it is read)

Dense linears are torch's products over weights that are merged in place (q|k|v, gate|up), so a dense model takes the
same step with the same care. Values are rounded where transformers rounds them. The step reads its token and position
from the device and can be captured in a CUDA graph; under Triton's interpreter it runs on a CPU, for tests.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsify.errors import SparsifyError
from sparsify.kernels.gpu import attention, gate, norm, site
from sparsify.kernels.gpu.scratch import Scratch
from sparsify.kernels.gpu.site import Lists
from sparsify.kernels.gpu.tiles import MOST_TOKENS, Table, table_of
from sparsify.kernels.spec import SparseTensors
from sparsify.kernels.triton_backend import BACKEND, DTYPES
from sparsify.linear import SparseLinear
from sparsify.llama_like import Watch, problem_of

# Where a step can be made: on meta tensors its launches can be counted, in Triton's interpreter it runs on a CPU.
_DEVICES = ("cuda", "meta", *(["cpu"] if site.INTERPRETED else []))
# Positions whose rotation is computed at once.
_ANGLES = 4096


def problem(model: PreTrainedModel) -> str | None:
    """Returns why the GPU decode step cannot run this model, in one line; None where it can."""
    config: Any = model.config
    found = problem_of(
        model,
        device=model.device.type if model.device.type in _DEVICES else "cuda",
        dtypes=DTYPES,
        activations=site.ACTIVATIONS,
        backend=BACKEND.name,
    )
    if found is not None:
        return found
    decoder: Any = model.model
    head_size = int(decoder.layers[0].self_attn.head_dim)
    if head_size % 2 or config.num_attention_heads > attention.MOST_GROUP * config.num_key_value_heads:
        heads = f"{config.num_attention_heads} query heads, {config.num_key_value_heads} key heads of {head_size}"
        return f"{heads}: an even size and at most {attention.MOST_GROUP} query heads for a key head are needed"
    if config.hidden_size > norm.MOST_WIDTH:
        return f"hidden_size {config.hidden_size} is above {norm.MOST_WIDTH}"
    devices = {t.device for t in model.parameters()}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}"
    return None


class Sparse:
    """The sparse linears of one site as launches, with thresholds of their own tensors, or none of them kept out."""

    def __init__(self, linears: Sequence[SparseLinear], *, run_dense: bool, step: "GpuStep") -> None:
        self._step = step
        self._tensors = [layer.every_channel() if run_dense else layer.tensors() for layer in linears]
        for t in self._tensors:
            site.checked(t.weight.new_empty(1, t.weight.shape[1]), t)

    @property
    def selected(self) -> Sequence[SparseTensors]:
        """The linears whose lists a norm before this site can make: all of one launch that walks lists, else none."""
        one_launch = len(site.groups(self._tensors)) == 1
        return self._tensors if one_launch and site.is_indexed(self._tensors, self._step.table) else ()

    def __call__(self, x: Tensor, *, up: Tensor | None = None, lists: Lists | None = None) -> list[Tensor]:
        step = self._step
        return site.run_linears(
            x, self._tensors, scratch=step.scratch, table=step.table, up=up, activation=step.activation, lists=lists
        )


class Dense:
    """Dense linears of one site as one product of torch; their weights are rows of one matrix from here on."""

    selected: Sequence[SparseTensors] = ()

    def __init__(self, linears: Sequence[nn.Linear], *, step: "GpuStep") -> None:
        self._step = step
        self._sizes = [linear.out_features for linear in linears]
        self._weight = _merged([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = _merged(biases) if biases else None

    def __call__(self, x: Tensor, *, up: Tensor | None = None, lists: Lists | None = None) -> list[Tensor]:
        if up is not None:
            x = gate.run_gate(x, up, self._step.activation, scratch=self._step.scratch)
        y = F.linear(x, self._weight, self._bias)
        return list(torch.split(y, self._sizes, dim=-1))


class Mixed:
    """A site whose linears are not all alike: each by itself."""

    selected: Sequence[SparseTensors] = ()

    def __init__(self, parts: Sequence[Sparse | Dense]) -> None:
        self._parts = parts

    def __call__(self, x: Tensor, *, up: Tensor | None = None, lists: Lists | None = None) -> list[Tensor]:
        return [y for part in self._parts for y in part(x, up=up)]


class GpuStep:
    """One decode step of `batch` sequences that are all at one position, over a static cache of `capacity` tokens.

    tokens [B] int64 and position [] int64 are read on the device; keys and values are [B, KH, capacity, D] by block.
    run_dense: converted layers keep every channel; share: another step of the model, batch and capacity whose cache
    this one uses too. Raises SparsifyError for a model that `problem` has words for, more sequences than a launch
    takes, or a cache to share of another model or shape.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch: int,
        capacity: int,
        run_dense: bool = False,
        share: "GpuStep | None" = None,
    ) -> None:
        reason = problem(model)
        if reason is not None:
            raise SparsifyError(f"{type(model).__name__} cannot decode by the GPU step: {reason}")
        if not 1 <= batch <= MOST_TOKENS:
            raise SparsifyError(f"a batch of {batch}: the GPU step takes 1 to {MOST_TOKENS} sequences")
        model_: Any = model
        config = model_.config
        self.model, self.batch, self.capacity, self.run_dense = model, batch, capacity, run_dense
        self.scratch = Scratch(model.device)
        self.table: Table = table_of(model.device)
        self.activation = config.hidden_act
        self._decoder = model_.model
        self._blocks = list(self._decoder.layers)[: config.num_hidden_layers]
        first = self._blocks[0].self_attn
        self._scaling = float(first.scaling)
        self._windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        self._sites = [self._sites_of(block) for block in self._blocks]
        self._head = self._site([model_.lm_head])
        device = model.device
        shape = (batch, config.num_key_value_heads, capacity, int(first.head_dim))
        if share is not None and (share.model is not model or share.keys[0].shape != shape):
            raise SparsifyError(f"the cache to share is {list(share.keys[0].shape)}, {list(shape)} is needed here")
        self.keys: list[Tensor] = _zeros(len(self._blocks), shape, model) if share is None else share.keys
        self.values: list[Tensor] = _zeros(len(self._blocks), shape, model) if share is None else share.values
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self._cosine, self._sine = self._angles()
        self._watch = Watch(model, [*model.parameters(), *model.buffers()])

    def is_current(self) -> bool:
        """Whether the model is still made of what the step points to."""
        return self._watch.is_current()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Returns the logits [B, V] after `tokens`, and appends their keys and values at `position`."""
        with site.on_device(self.model.device):
            return self._run()

    def _run(self) -> Tensor:
        residual = self._decoder.embed_tokens(self.tokens)
        delta: Tensor | None = None
        for number, (block, (qkv, o, gate_up, down)) in enumerate(zip(self._blocks, self._sites, strict=True)):
            inner = block.self_attn
            x, lists = self._norm(residual, delta, block.input_layernorm, qkv)
            q, k, v = qkv(x, lists=lists)
            y = attention.run_attention(
                q, k, v, self.keys[number], self.values[number], self._cosine, self._sine, self.position,
                scaling=self._scaling, window=self._windows[number], scratch=self.scratch, **_head_norms(inner),
            )  # fmt: skip
            (delta,) = o(y)
            x, lists = self._norm(residual, delta, block.post_attention_layernorm, gate_up)
            g, u = gate_up(x, lists=lists)
            (delta,) = down(g, up=u)
        x, _ = self._norm(residual, delta, self._decoder.norm, self._head)
        return self._head(x)[0]

    def fill(self, cache: Any, length: int) -> None:
        """Takes the keys and values of a prompt of `length` tokens from a DynamicCache, and its position.

        Raises SparsifyError where the prompt does not fit.
        """
        if length >= self.capacity:
            raise SparsifyError(f"a prompt of {length} tokens leaves no room in a cache of {self.capacity}")
        for number, layer in enumerate(cache.layers):
            # A sliding window's layer holds the last tokens only.
            held = layer.keys.shape[-2]
            self.keys[number][:, :, length - held : length].copy_(layer.keys)
            self.values[number][:, :, length - held : length].copy_(layer.values)
        self.position.fill_(length)

    def _norm(
        self, residual: Tensor, delta: Tensor | None, module: Any, following: Sparse | Dense | Mixed
    ) -> tuple[Tensor, Lists | None]:
        selected = following.selected if self.batch == 1 else ()
        return norm.run_norm(
            residual, delta, module.weight, module.variance_epsilon, scratch=self.scratch, select_for=selected
        )

    def _sites_of(self, block: Any) -> tuple[Sparse | Dense | Mixed, ...]:
        inner, mlp = block.self_attn, block.mlp
        modules = ([inner.q_proj, inner.k_proj, inner.v_proj], [inner.o_proj], [mlp.gate_proj, mlp.up_proj])
        return (*(self._site(linears) for linears in modules), self._site([mlp.down_proj]))

    def _site(self, modules: Sequence[nn.Module]) -> Sparse | Dense | Mixed:
        sparse = [module for module in modules if isinstance(module, SparseLinear)]
        dense = [module for module in modules if type(module) is nn.Linear]
        if len(sparse) == len(modules):
            return Sparse(sparse, run_dense=self.run_dense, step=self)
        alike = len({linear.bias is None for linear in dense}) == 1
        if len(dense) == len(modules) and alike:
            return Dense(dense, step=self)
        return Mixed([part for module in modules if isinstance(part := self._site([module]), Sparse | Dense)])

    def _angles(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine [capacity, D] by the model's own module."""
        like = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
        cosine, sine = [], []
        with torch.no_grad():
            for start in range(0, self.capacity, _ANGLES):
                positions = torch.arange(start, min(start + _ANGLES, self.capacity), device=self.model.device)[None]
                both = self._decoder.rotary_emb(like, position_ids=positions)
                cosine.append(both[0][0])
                sine.append(both[1][0])
        return torch.cat(cosine).contiguous(), torch.cat(sine).contiguous()


def _zeros(number: int, shape: tuple[int, ...], model: PreTrainedModel) -> list[Tensor]:
    return [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(number)]


def _head_norms(attention_module: Any) -> dict[str, Any]:
    if not hasattr(attention_module, "q_norm"):
        return {}
    q_norm, k_norm = attention_module.q_norm, attention_module.k_norm
    return {"q_weight": q_norm.weight, "k_weight": k_norm.weight, "epsilon": q_norm.variance_epsilon}


def _merged(parameters: Sequence[Tensor]) -> Tensor:
    """Returns the parameters as one tensor, of which each becomes a part: no second copy stays."""
    if len(parameters) == 1:
        return parameters[0].detach()
    first = parameters[0].detach()
    rows = sum(p.shape[0] for p in parameters)
    if all(p.is_contiguous() for p in parameters) and all(_follows(a, b) for a, b in pairwise(parameters)):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, torch.split(whole, [p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return whole


def _follows(a: Tensor, b: Tensor) -> bool:
    """Whether b stands behind a in the same memory."""
    same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return same and a.data_ptr() + a.nbytes == b.data_ptr()
