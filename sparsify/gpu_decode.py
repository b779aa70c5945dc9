"""Decoding of Llama-like models on a GPU under CUDA graphs, behind the model's own `generate`.

A token is one replay of a graph: the step, the choice of the next token and its bookkeeping all happen on the device,
and the host looks only now and then whether every sequence has ended. After `enable`, a `generate` that asks for
greedy decoding or plain sampling (temperature, top-k, top-p, min-p) runs so, dense or converted; every other one
(beams, other processors or criteria, padding, streamers, scores, a cache of the caller's, more than 8 sequences) runs
transformers' code as before. The prompt runs through transformers' forward in any case, sparse or dense as it says.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from sparsify.errors import SparsifyError
from sparsify.gpu_step import GpuStep, problem
from sparsify.kernels.gpu.tiles import MOST_TOKENS
from sparsify.llama_like import has_hooks
from sparsify.runtime import dense

# Capacities are whole numbers of these, so that few lengths need a graph of their own.
_CAPACITY = 512
# Replays between two looks at whether all sequences have ended: a look waits for the device.
_LOOK = 16
_WARM_UPS = 2
# Settings of a generation that transformers' own loop is needed for.
_UNUSUAL = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
    "cache_implementation",
)  # fmt: skip
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
# What a call of `generate` may give: anything else is left to transformers.
_KNOWN = {
    "inputs", "input_ids", "attention_mask", "generation_config", "max_new_tokens", "max_length", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """How a next token is chosen: the highest score, or drawn from the scores as the warpers leave them.

    ends: tokens that end a sequence; pad: what follows in one that has ended; follow: the next token is that of a text
    (`GpuDecoder.following`), and what is chosen is only written down.
    """

    follow: bool = False
    sample: bool = False
    warpers: tuple[Any, ...] = ()
    ends: tuple[int, ...] = ()
    pad: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        settings = [(type(w).__name__, *sorted((k, str(v)) for k, v in vars(w).items())) for w in self.warpers]
        return (self.follow, self.sample, tuple(settings), self.ends, self.pad)


class GpuDecoder:
    """Decodes `batch` sequences of one length with a model; run_dense keeps every channel of converted layers.

    Graphs are made when they are first needed, for a capacity and a way to choose, and made anew when the model
    changed. Raises SparsifyError as GpuStep does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch: int = 1,
        capacity: int = _CAPACITY,
        run_dense: bool = False,
        share: GpuStep | None = None,
    ) -> None:
        self.model, self.batch, self.run_dense = model, batch, run_dense
        self._make(capacity, share)

    # Its buffers outlive the call that makes them, which may run under inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, capacity: int, share: GpuStep | None = None) -> None:
        self.step = GpuStep(self.model, batch=self.batch, capacity=capacity, run_dense=self.run_dense, share=share)
        device = self.model.device
        self._written = torch.zeros(self.batch, capacity + 1, dtype=torch.int64, device=device)
        self._text = torch.zeros_like(self._written)
        self._ended = torch.zeros(self.batch, dtype=torch.bool, device=device)
        self._replays: dict[tuple[Any, ...], Callable[[], object]] = {}
        self.logits = torch.zeros(0, device=device)

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: Any = None) -> Tensor:
        """Runs a prompt [B, S] through transformers' forward; returns its last logits [B, V].

        cache: an empty DynamicCache to use. Raises SparsifyError for another batch than the decoder's.
        """
        if ids.shape[0] != self.batch:
            raise SparsifyError(f"{ids.shape[0]} sequences: this decoder was made for {self.batch}")
        length = ids.shape[1]
        if length >= self.step.capacity or not self.step.is_current():
            self._make(max(self.step.capacity, rounded_up(length + 1)))
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        with dense(self.model) if self.run_dense else nullcontext():
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.step.fill(cache, length)
        logits: Tensor = output.logits[:, -1]
        return logits

    @torch.no_grad()
    def generate(self, ids: Tensor, new_tokens: int, choice: Choice | None = None, cache: Any = None) -> Tensor:
        """Returns ids [B, S] and what follows, at most new_tokens more, fewer where every sequence ended before."""
        choice = choice or Choice()
        length = ids.shape[1]
        if length + new_tokens > self.step.capacity:
            self._make(rounded_up(length + new_tokens))
        logits = self.prefill(ids, cache)
        self._ended.zero_()
        self._written[:, :length] = ids
        self.step.position.sub_(1)
        self._take(logits, choice)
        replay = self.replay(choice)
        for number in range(1, new_tokens):
            if choice.ends and number % _LOOK == 0 and bool(self._ended.all()):
                break
            replay()
        written = self._written[:, : int(self.step.position) + 1].clone()
        return _trimmed(written, length, choice)

    def replay(self, choice: Choice | None = None) -> Callable[[], object]:
        """Returns what decodes one token and chooses the next, as one replay of a graph (on a CPU: a plain call)."""
        choice = choice or Choice()
        if choice.key not in self._replays:
            self._replays[choice.key] = self._captured(choice)
        return self._replays[choice.key]

    def following(self, text: Tensor) -> Callable[[], object]:
        """Returns a replay whose next tokens are those of text [B, S] at their positions, whatever would be chosen."""
        self._text[:, : text.shape[1]] = text
        return self.replay(Choice(follow=True))

    def start(self, tokens: Tensor, position: int) -> None:
        """Sets the next tokens [B] and their position."""
        self.step.tokens.copy_(tokens)
        self.step.position.fill_(position)
        self._ended.zero_()

    def _captured(self, choice: Choice) -> Callable[[], object]:
        def advance() -> None:
            self.logits = self.step()
            self._take(self.logits, choice)

        device = self.model.device
        if device.type != "cuda":
            return advance
        state = (self.step.tokens, self.step.position, self._ended, self._written)
        before = [tensor.clone() for tensor in state]
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        seed = generator.get_state()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # Compiles the kernels, and lets torch's products take their memory.
                for _ in range(_WARM_UPS):
                    advance()
                    for tensor, old in zip(state, before, strict=True):
                        tensor.copy_(old)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                advance()
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        # Tokens drawn for nothing do not count.
        generator.set_state(seed)
        logits = self.logits

        def replay() -> None:
            graph.replay()
            # Of this graph: another one has its own.
            self.logits = logits

        return replay

    def _take(self, logits: Tensor, choice: Choice) -> None:
        """Chooses from logits [B, V], writes the tokens behind the position, and moves on."""
        scores = logits.float()
        for warper in choice.warpers:
            scores = warper(None, scores)
        if choice.sample:
            shares = torch.softmax(scores, dim=-1)
            # What torch.multinomial does for one draw, without its checks.
            chosen = (shares / torch.empty_like(shares).exponential_(1)).argmax(-1)
        else:
            chosen = scores.argmax(-1)
        if choice.ends:
            chosen = torch.where(self._ended, choice.pad, chosen)
            for end in choice.ends:
                self._ended.logical_or_(chosen == end)
        self.step.position.add_(1)
        if choice.follow:
            self.step.tokens.copy_(self._text.index_select(1, self.step.position.view(1)).view(-1))
        else:
            self.step.tokens.copy_(chosen)
        self._written.index_copy_(1, self.step.position.view(1), chosen.view(-1, 1))


class Generate:
    """The `generate` of one model: by graphs where the call is plain, else the class's own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Calls that ran by graphs.
        self.used = 0
        self._decoders: dict[tuple[int, bool], GpuDecoder] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = cast(Any, type(self.model)).generate
        if self._is_plain(args, kwargs):
            kwargs["custom_generate"] = self._decode
        return own(self.model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Generate":
        # Inside a deep copy of the model, whose copy is in the memo by now; graphs point into the original.
        return Generate(memo.get(id(self.model), self.model))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoders": {}}

    def _is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) > 1 or any(value is not None for name, value in kwargs.items() if name not in _KNOWN):
            return False
        given = kwargs.get("generation_config")
        config: Any = self.model.generation_config if given is None else given
        several = any((getattr(config, name, None) or 1) != 1 for name in ("num_beams", "num_return_sequences"))
        uncached = kwargs.get("use_cache") is False or config.use_cache is False
        unusual = several or uncached or any(getattr(config, name, None) for name in _UNUSUAL)
        return not unusual and problem(self.model) is None and not has_hooks(self.model)

    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """What transformers calls in the place of its own loop, with everything prepared."""
        choice = _choice(logits_processor, stopping_criteria, generation_config)
        cache = model_kwargs.get("past_key_values")
        mask = model_kwargs.get("attention_mask")
        plain = (
            choice is not None
            and 1 <= input_ids.shape[0] <= MOST_TOKENS
            and input_ids.device == model.device
            and (mask is None or bool(mask.all()))
            and (cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 0))
        )
        new_tokens = int(generation_config.max_length) - input_ids.shape[1]
        if not plain or choice is None or new_tokens < 1:
            looped: Tensor = cast(Any, type(model))._sample(
                model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
                generation_config=generation_config, **model_kwargs,
            )  # fmt: skip
            return looped
        self.used += 1
        return self._decoder(input_ids.shape[0]).generate(input_ids, new_tokens, choice, cache)

    def _decoder(self, batch: int) -> GpuDecoder:
        switch = getattr(self.model, "sparsity_switch", None)
        key = (batch, switch is not None and switch.forced_dense)
        if key not in self._decoders:
            # One cache is kept for the next call, dense and sparse; those for other batches are given back.
            self._decoders = {other: decoder for other, decoder in self._decoders.items() if other[0] == batch}
            self._decoders[key] = GpuDecoder(self.model, batch=batch, run_dense=key[1])
        return self._decoders[key]


def enable(model: PreTrainedModel) -> None:
    """Lets `model.generate` decode by CUDA graphs, dense or converted. Raises SparsifyError where it cannot."""
    reason = problem(model)
    if reason is not None:
        raise SparsifyError(f"{type(model).__name__} cannot decode by CUDA graphs: {reason}")
    enable_on_gpu(model)


def enable_on_gpu(model: PreTrainedModel) -> None:
    """The same for a model of any kind, wherever it stands now: graphs are used while it is one that can, on a GPU."""
    if generate_of(model) is None and isinstance(model, GenerationMixin):
        cast(Any, model).generate = Generate(model)


def disable(model: PreTrainedModel) -> None:
    """Gives the model its own `generate` back."""
    if generate_of(model) is not None:
        del model.__dict__["generate"]


def generate_of(model: PreTrainedModel) -> Generate | None:
    """Returns what `enable` has put in the place of the model's `generate`, or None."""
    found = model.__dict__.get("generate")
    return found if isinstance(found, Generate) else None


def rounded_up(tokens: int) -> int:
    """Returns the capacity of a cache for so many tokens."""
    return -(-tokens // _CAPACITY) * _CAPACITY


def _choice(processors: LogitsProcessorList, criteria: Sequence[Any], config: Any) -> Choice | None:
    """Returns how transformers would choose, None where it would do more than a Choice can."""
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return None
    if any(type(p) not in _WARPERS for p in processors):
        return None
    if any(type(c) not in (EosTokenCriteria, MaxLengthCriteria) for c in criteria):
        return None
    ends = [token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.flatten().tolist()]
    pad = config._pad_token_tensor
    if ends and pad is None:
        return None
    sample = config.get_generation_mode() is GenerationMode.SAMPLE
    return Choice(sample=sample, warpers=tuple(processors), ends=tuple(ends), pad=0 if pad is None else int(pad))


def _trimmed(written: Tensor, length: int, choice: Choice) -> Tensor:
    """Cuts off what was written after the last sequence ended."""
    if not choice.ends:
        return written
    new = written[:, length:]
    ends = torch.tensor(choice.ends, device=new.device)
    ended = torch.isin(new, ends).cumsum(-1) > 0
    # A sequence's own end is kept: what stands after it is padding.
    kept = int((~ended).sum(-1).max()) + 1
    return written[:, : length + min(kept, new.shape[1])]
