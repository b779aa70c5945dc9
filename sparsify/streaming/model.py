"""A model of which one decoder block at a time is in memory, behind the model's own forward.

Every forward runs the model's code from the embedding to the last norm. The block that is in memory takes the hidden
states that were carried to it in the place of what comes in, all others pass on what they get, so masks, positions and
whatever else a family gives its blocks are made by the family's own code; a forward costs one block. What is small
outside of the blocks stays in memory; of the embedding only rows that are looked up are read, and the head only where
logits are wanted. Not covered: models that do more between their blocks than pass hidden states on, which are refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from sparsify.errors import SparsifyError
from sparsify.streaming.carried import Carried, States
from sparsify.streaming.source import Source
from sparsify.targets import Targets, decoder_blocks, find_targets


class BlockwiseModel:
    """A skeleton on the meta device whose blocks are filled one at a time; see the module."""

    def __init__(self, model: PreTrainedModel, source: Source, device: torch.device) -> None:
        self.model, self.source, self.device = model, source, device
        self.prefix, blocks = decoder_blocks(model)
        self.blocks = list(blocks)
        self.embedding: Any = model.get_input_embeddings()
        self.head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._is_tied = self.head is not None and self.head.weight is self.embedding.weight
        self._names = {id(module): name for name, module in model.named_modules()}
        self._forms: dict[int, int | None] = {}
        self._live: int | None = None
        self._batch: Tensor | None = None
        self._read: States | None = None
        self._write: Carried | None = None
        self._noise = False
        self._last: Tensor | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model's forward runs; what is outside of the blocks, embedding and head is read before."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        small = [m for m in self.model.modules() if id(m) not in inside and m is not self.head]
        with self._placed_embedding(), self._filled(small):
            for index, block in enumerate(self.blocks):
                block.forward = self._passing(index)
            try:
                yield
            finally:
                for block in self.blocks:
                    del block.forward

    def find_targets(self, tokens: Tensor) -> Targets:
        """Returns find_targets of the model; blocks run on tensors without memory for it.

        Raises SparsifyError where blocks do not run so, or depend on more than the hidden states of the one before.
        """
        try:
            self._forms = {}
            seen: list[list[Tensor]] = []
            for self._noise in (False, True):
                calls: dict[int, list[Tensor]] = {}
                for index, block in enumerate(self.blocks):
                    block.forward = self._probing(index, calls)
                targets = find_targets(self.model, tokens)
                seen.append([tensor for index in sorted(calls) for tensor in calls[index]])
        except (RuntimeError, NotImplementedError) as problem:
            self._refuse(f"does not run block by block ({str(problem).partition(chr(10))[0]})")
        finally:
            self._noise, self._batch, self._last = False, None, None
            for index, block in enumerate(self.blocks):
                block.forward = self._passing(index)
        if len(seen[0]) != len(seen[1]) or not all(torch.equal(a, b) for a, b in zip(*seen, strict=True)):
            self._refuse("gives its blocks more than hidden states that depend on the tokens")
        return targets

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Inside, block `index` is in memory and runs; on leaving, it is as it was, whatever was put into it."""
        block = self.blocks[index]
        before = {name: module for name, module in block.named_modules() if name}
        stub = block.__dict__.pop("forward")
        with self._filled(list(block.modules())):
            handles = [
                block.register_forward_pre_hook(self._replace_input, with_kwargs=True),
                block.register_forward_hook(self._take_output),
            ]
            self._live = index
            try:
                yield block
            finally:
                self._live, self._batch = None, None
                for handle in handles:
                    handle.remove()
                for name, module in before.items():
                    if block.get_submodule(name) is not module:
                        block.set_submodule(name, module)
                block.forward = stub

    @contextmanager
    def carrying(self, read: States | None, write: Carried | None) -> Iterator[None]:
        """Inside, forwards take the hidden states of their tokens from `read`, and the block's go to `write`.

        Without a block in memory, `read` holds what the last norm gets; without `read`, the embedding's rows are looked
        up, and `write` gets what comes into the first block.
        """
        self._read, self._write = read, write
        try:
            yield
        finally:
            self._read, self._write, self._batch = None, None, None

    def embed(self, batches: Sequence[Tensor], write: Carried) -> None:
        """Stores what comes into the first block for every batch of tokens [B, S]; reads the rows that they name."""
        rows: Tensor = torch.unique(torch.cat([batch.reshape(-1) for batch in batches]))
        name = f"{self._names[id(self.embedding)]}.weight"
        weight = self.embedding.weight
        few = self.source.rows(name, rows.tolist(), dtype=weight.dtype, device=self.device)
        look_up, padding = type(self.embedding).forward, self.embedding.padding_idx

        def forward(ids: Tensor) -> Tensor:
            self._batch = ids
            found: Tensor = look_up(self.embedding, torch.searchsorted(rows.to(ids.device), ids))
            return found

        placed = self.embedding.__dict__["forward"]
        self.embedding.weight, self.embedding.padding_idx = nn.Parameter(few, requires_grad=False), None
        self.embedding.forward = forward
        try:
            with self.carrying(None, write):
                for batch in batches:
                    self.run(batch)
        finally:
            self.embedding.weight, self.embedding.padding_idx = weight, padding
            self.embedding.forward = placed

    def run(self, batch: Tensor) -> None:
        """Runs a forward without a head on tokens [B, S]."""
        with torch.inference_mode():
            self.model.base_model(input_ids=batch.to(self.device), use_cache=False)

    @contextmanager
    def with_head(self) -> Iterator[None]:
        """Inside, the head is in memory, so that forwards return logits."""
        placed = self.embedding.weight
        with self._filled([] if self.head is None else [self.head]):
            if self._is_tied:
                self.embedding.weight = self.head.weight
            try:
                yield
            finally:
                self.embedding.weight = placed

    @contextmanager
    def _placed_embedding(self) -> Iterator[None]:
        weight = self.embedding.weight
        # Of the right shape, dtype and device, in the memory of one row.
        row = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=self.device)
        self.embedding.weight = nn.Parameter(row.expand(weight.shape), requires_grad=False)
        # As transformers marks what it read: a scaled embedding's other buffers are still to be computed.
        self.embedding.weight._is_hf_initialized = True
        self.embedding.forward = self._passing_embedding
        try:
            yield
        finally:
            del self.embedding.forward
            self.embedding.weight = weight

    def _passing_embedding(self, ids: Tensor) -> Tensor:
        self._batch = ids
        weight = self.embedding.weight
        make = torch.randn if self._noise else torch.zeros
        return make(*ids.shape, weight.shape[1], dtype=weight.dtype, device=self.device)

    def _passing(self, index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0 and self._read is None and self._write is not None and self._batch is not None:
                self._write.store(self._batch, hidden)
            if index == len(self.blocks) - 1:
                if self._live is None and self._read is not None and self._batch is not None:
                    hidden = self._read.load(self._batch, self.device)
                self._batch = None
            return self._as_output(index, hidden)

        return forward

    def _as_output(self, index: int, hidden: Tensor) -> Any:
        length = self._forms[index]
        return hidden if length is None else (hidden, *[None] * (length - 1))

    def _replace_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A block that is called by itself, not in a forward of the model, gets what it is called with.
        if self._batch is None or self._read is None:
            return None
        hidden = self._read.load(self._batch, self.device)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def _take_output(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._batch is not None and self._write is not None:
            self._write.store(self._batch, output[0] if isinstance(output, tuple) else output)
        if self._live == len(self.blocks) - 1:
            self._batch = None

    def _probing(self, index: int, calls: dict[int, list[Tensor]]) -> Any:
        block = self.blocks[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index and hidden is not self._last:
                self._refuse("does more between its blocks than pass hidden states on")
            rest = kwargs if args else {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls[index] = [x for x in tree_leaves((args[1:], rest)) if isinstance(x, Tensor)]
            bare_args, bare_kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
            output = type(block).forward(block, *bare_args, **bare_kwargs)
            self._forms[index] = len(output) if isinstance(output, tuple) else None
            self._last = torch.randn_like(hidden) if self._noise else torch.zeros_like(hidden)
            return self._as_output(index, self._last)

        return forward

    def _refuse(self, why: str) -> None:
        raise SparsifyError(f"--stream: a {type(self.model).__name__} {why}: leave --stream out, on a larger machine")

    @contextmanager
    def _filled(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, what is on the meta device of the modules' own tensors holds what the source has, or is computed."""
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        wanted: dict[str, tuple[dict[str, Any], str]] = {}
        computed: list[nn.Module] = []
        try:
            for module in modules:
                name, unstored = self._names[id(module)], module._non_persistent_buffers_set
                tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for held in tensors:
                    for key, tensor in held.items():
                        if tensor is None or not tensor.is_meta:
                            continue
                        before.append((held, key, tensor))
                        if key in unstored:
                            held[key] = torch.empty_like(tensor, device=self.device)
                            computed += [module] if module not in computed[-1:] else []
                        else:
                            wanted[f"{name}.{key}" if name else key] = held, key
            # First, while the parameters are those that count as initialised.
            self._compute_buffers(computed)
            for name in self.source.in_order(list(wanted)):
                held, key = wanted[name]
                tensor = self.source.read(name, dtype=held[key].dtype, device=self.device)
                held[key] = nn.Parameter(tensor, requires_grad=False) if isinstance(held[key], nn.Parameter) else tensor
            yield
        finally:
            for held, key, tensor in before:
                held[key] = tensor

    def _compute_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Fills rotations, masks and other buffers that no file holds as from_pretrained does."""
        owners = [(name, m) for name, m in self.model.named_modules() if isinstance(m, PreTrainedModel)]
        with torch.no_grad():
            for module in modules:
                name = self._names[id(module)]
                inner = [owner for prefix, owner in owners if not prefix or f"{name}.".startswith(f"{prefix}.")]
                inner[-1]._init_weights(module)  # type: ignore[no-untyped-call]
