"""lm-eval's model type `sparsify`: its Hugging Face model with a protocol and with realised densities by task.

every-token: one forward a request, every token sparse; a generation's prompt is sparse, too. decode: the context but
its last token runs dense into a KV cache, then that token and the continuation run sparse on the cache, so that a
sparse position predicts every scored token; a generation's prompt runs dense as a whole, as `generate` does with
prefill "dense". Where the context is one token (loglikelihood_rolling) nothing is left to run dense.

Only requests of one length share a batch, so there is no padding: it would cost time and count as tokens. With a batch
size of 1 scores are those of lm-eval's `hf`. Not covered: lm-eval's automatic batch size.
Import this module only where lm_eval is installed, and inside functions.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from sparsify.errors import SparsifyError, suggest
from sparsify.evals.perplexity import Protocol, decode_logits
from sparsify.evals.realised import RealisedDensity
from sparsify.prompt_choice import chooses_per_prompt
from sparsify.runtime import sparse_layers, switch_of, with_prefill


@register_model("sparsify")
class SparsifyLM(HFLM):  # type: ignore[misc]
    """lm-eval's HFLM on a converted or a dense model; options are HFLM's.

    realised: densities by task name. truncated: by task name, requests that lost tokens on the left.
    progress is called with (task, requests done, requests in all). Raises SparsifyError for an unknown protocol, and
    for the options that a protocol or the counting of tokens cannot have.
    """

    def __init__(self, pretrained: Any, protocol: str = "every-token", **options: Any) -> None:
        allowed = get_args(Protocol)
        if protocol not in allowed:
            raise SparsifyError(
                f"unknown protocol {protocol!r}: allowed are {', '.join(allowed)}.{suggest(protocol, allowed)}"
            )
        size = options.get("batch_size", 1)
        if not str(size).isdecimal() or int(size) < 1:
            raise SparsifyError(f"the batch size must be a whole number of at least 1, not {size!r}")
        if protocol == "decode" and options.get("mixed_precision_dtype") is not None:
            raise SparsifyError("protocol decode runs in the model's dtype: leave mixed_precision_dtype out")
        super().__init__(pretrained, **options)
        self.protocol = protocol
        self.realised: dict[str, RealisedDensity] = {}
        self.truncated: Counter[str] = Counter()
        self.progress: Callable[[str, int, int], None] | None = None
        self._task = ""
        self._prompt = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._by_task(self._generate, requests, disable_tqdm)

    def _by_task(self, answer: Any, requests: Sequence[Any], disable_tqdm: bool) -> list[Any]:
        """Answers the requests a task at a time, so that what is counted belongs to one."""
        answers: list[Any] = [None] * len(requests)
        for task, places in _grouped(request.task_name or "" for request in requests):
            self._task = task
            self.realised.setdefault(task, RealisedDensity(self.model))
            found = answer([requests[place] for place in places], disable_tqdm=disable_tqdm or self.progress)
            _put(answers, places, found)
            self._report(len(places), len(places))
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers: list[Any] = [None] * len(requests)
        lengths = [self._lengths(context, continuation) for _, context, continuation in requests]
        # Windows of loglikelihood_rolling come in batches: there is no telling how many there are in all.
        counted = override_bs is None
        with tqdm(total=len(requests), disable=bool(disable_tqdm) or not counted) as bar:
            for (_, self._prompt), places in sorted(_grouped(lengths), reverse=True):
                group = [requests[place] for place in places]
                found = super()._loglikelihood_tokens(group, disable_tqdm=True, override_bs=override_bs)
                _put(answers, places, found)
                bar.update(len(places))
                if counted:
                    self._report(sum(answer is not None for answer in answers), len(requests))
        self._prompt = 0
        return answers

    def _lengths(self, context: list[int], continuation: list[int]) -> tuple[int, int]:
        """Returns how many tokens of a request are fed, as lm-eval cuts them, and how many of these run dense first."""
        whole = len(context) + len(continuation)
        self.truncated[self._task] += whole > self.max_length + 1
        fed = min(whole - 1, self.max_length)
        return fed, fed - len(continuation) if self.protocol == "decode" else 0

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if not self._prompt:
            self._refuse_without_prompt()
        with torch.no_grad(), with_prefill(self.model, "sparse"), self.realised[self._task]:
            if self._prompt:
                return decode_logits(self.model, inps, self._prompt)
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits

    def _generate(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), disable=bool(disable_tqdm)) as bar:
            for _, places in sorted(_grouped(self._prompt_length(*request.args) for request in requests), reverse=True):
                found = super().generate_until([requests[place] for place in places], disable_tqdm=True)
                _put(answers, places, found)
                bar.update(len(places))
                self._report(sum(answer is not None for answer in answers), len(requests))
        return answers

    def _prompt_length(self, prompt: str, settings: dict[str, Any]) -> int:
        length = len(self.tok_encode(prompt))
        room = self.max_length - int(normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"])
        if room < 1:
            raise SparsifyError(
                f"task {self._task} writes {self.max_length - room} tokens, this model has {self.max_length} positions "
                "for prompt and text: lower max_gen_toks in a copy of the task (--include-path), or take another task"
            )
        self.truncated[self._task] += length > room
        return length

    def _refuse_without_prompt(self) -> None:
        if chooses_per_prompt(self.model) and switch_of(self.model).sparse:
            raise SparsifyError(
                f"protocol {self.protocol} has no dense prompt in task {self._task}, and this model's neurons are "
                "chosen by one: use --protocol decode and tasks with a context, or --dense"
            )

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        if self.protocol == "every-token":
            self._refuse_without_prompt()
        with with_prefill(self.model, "dense" if self.protocol == "decode" else "sparse"):
            written: Tensor = super()._model_generate(context, max_length, stop, **settings)
        if sparse_layers(self.model) and switch_of(self.model).sparse:
            for row in written:
                self._count(row, context.shape[1])
        return written

    @torch.no_grad()
    def _count(self, row: Tensor, prompt: int) -> None:
        """Counts what a generated sequence [S] kept, in one more forward: hooks would slow decoding to another path."""
        kept = len(row)
        while kept > prompt and int(row[kept - 1]) == self.tokenizer.pad_token_id:
            kept -= 1
        # The last token was written and never read.
        fed, dense = row[None, : max(kept - 1, prompt)], prompt if self.protocol == "decode" else 0
        if fed.shape[1] == dense:
            return
        with with_prefill(self.model, "sparse"), self.realised[self._task]:
            if dense:
                decode_logits(self.model, fed, dense)
            else:
                self.model(input_ids=fed, use_cache=False, logits_to_keep=1)

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(self._task, done, total)


def _grouped(keys: Iterable[Any]) -> Iterator[tuple[Any, list[int]]]:
    """Yields each key with the places where it stands, in the order of first places."""
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    yield from places.items()


def _put(answers: list[Any], places: list[int], found: list[Any]) -> None:
    for place, answer in zip(places, found, strict=True):
        answers[place] = answer
