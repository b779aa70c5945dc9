"""The story of a streamed conversion: targets → each block: read, choose, carry on, write → measure → describe.

The operations are those of the conversion in memory (sparsify.conversion) on the same inputs, so the files have the
same bytes. A linear's choice depends on its own dense inputs, and those on earlier blocks through the hidden states
only; what needs more than one block at a time is refused (`streaming_problem`). Every finished block is in the journal
of the unfinished folder (sparsify.streaming.partial), from where another process goes on.
"""

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify import __version__
from sparsify.allocation import Allocation, allocation_of
from sparsify.calibration import Calibration, Progress
from sparsify.checkpoint import read_config, read_ledger, source_name, write_beside
from sparsify.config import LinearEntry, SparsifyConfig
from sparsify.conversion import check_tokens, refuse_converted
from sparsify.errors import InterruptedConversionError, SparsifyError, UnavailableError
from sparsify.kernels import library
from sparsify.ledger import Ledger
from sparsify.manifest import write_manifest
from sparsify.methods import AnyMethod, Method, NeuronMethod
from sparsify.methods.relu import Relu
from sparsify.models import load_skeleton, local_folder
from sparsify.new_folder import is_disk_full, settle
from sparsify.plugin import add_sparse_layers
from sparsify.runtime import dense, switch_of
from sparsify.streaming.block import BlockConverter
from sparsify.streaming.carried import Carried, CarriedRecord, States, reopen
from sparsify.streaming.interruption import Interruption
from sparsify.streaming.memory import give_back
from sparsify.streaming.model import BlockwiseModel
from sparsify.streaming.partial import Journal, Partial, Unit
from sparsify.streaming.shards import Shards
from sparsify.streaming.source import Source
from sparsify.weight_files import save_description

CALIBRATION, DENSE, SPARSE = "calibration", "dense", "sparse"


class Evaluation(Protocol):
    """What measures a streamed model: batches of tokens [B, S] that are carried through it, dense and sparse."""

    def batches(self, model: PreTrainedModel) -> Sequence[Tensor]:
        """Returns the batches in which `measure` will run the text."""
        ...

    def densities(self, model: PreTrainedModel, run: Callable[[], None]) -> dict[str, float]:
        """Returns the realised densities of the sparse layers that `run` runs on all batches."""
        ...

    def measure(self, model: PreTrainedModel, densities: Mapping[str, float]) -> dict[str, Any] | None:
        """Returns what goes into results; forwards on the batches return logits, of the dense model inside `dense`."""
        ...

    def rows(self, measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Returns the rows of the model card."""
        ...


@dataclass(frozen=True)
class Streamed:
    """A finished checkpoint: its folder, configuration, byte ledger, and what was measured."""

    out: Path
    config: SparsifyConfig
    ledger: Ledger
    measured: dict[str, Any] | None


def convert_streamed(
    spec: str,
    out: str | Path,
    method: AnyMethod,
    calibration: Calibration,
    *,
    allocation: Allocation | str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    prefill: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str | None = None,
    settings: Mapping[str, Any] | None = None,
    evaluation: Evaluation | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Streamed:
    """Converts the model that `spec` names to the new folder `out`, one decoder block in memory at a time.

    The checkpoint has the bytes that load_dense, convert and save would have written. source and settings are what
    `save` takes; evaluation measures it on the way. With resume it goes on from the last finished block of the same
    conversion; note is called with what is worth saying.
    Raises SparsifyError for a method or allocation that cannot stream, an `out` that exists, and an unfinished folder
    that is another conversion's or not to be resumed; UnavailableError for a full disk and where another process
    converts to `out`; InterruptedConversionError after Ctrl-C. What was finished is kept in all these cases.
    """
    chooser = allocation_of(allocation, method)
    if (problem := streaming_problem(method, chooser)) is not None:
        raise SparsifyError(problem)
    say = note or (lambda message: None)
    assert not isinstance(method, NeuronMethod)
    model = load_skeleton(spec, dtype=dtype, trust_remote_code=trust_remote_code)
    refuse_converted(model)
    check_tokens(model, calibration.tokens)
    weights = Source(local_folder(spec), model)
    options = {"prefill": prefill, "trust remote code": trust_remote_code}
    with _problems(Path(out)), Partial(Path(out)) as partial:
        run = _Run(model, weights, torch.device(device), method, chooser, calibration, evaluation, partial, say)
        with run.blockwise.running():
            run.converter.plan()
            journal = partial.begin(run.fingerprint(spec, settings or {}, **options), resume=resume)
            if not journal.complete:
                config = run.convert(journal, progress)
        if not journal.complete:
            config.prefill = prefill or config.prefill
            run.assemble(journal)
            save_description(model, partial.checkpoint)
            rows = evaluation.rows(journal.measured) if evaluation is not None and journal.measured else None
            write_beside(model, partial.checkpoint, tokenizer, source or source_name(model), settings or {}, rows)
            run.seal(journal)
        partial.finish()
    return Streamed(Path(out), read_config(out), read_ledger(out), journal.measured)


def streaming_problem(method: AnyMethod, allocation: Allocation, *, rotate: bool = False) -> str | None:
    """Returns why a conversion cannot go block by block and what can, as one message; None where it can."""
    why = None
    if isinstance(method, Relu | NeuronMethod):
        why = f"method {method.name} is not made for it: it cuts neurons of MLPs"
    elif rotate or getattr(method, "rotation", None) in ("model", "where-possible"):
        what = "--rotate" if rotate else f"method {method.name}"
        why = f"{what} rotates the residual stream of the whole model"
    elif getattr(method, "learns_compensation", False):
        why = f"method {method.name} learns by gradients in the whole model"
    elif allocation.needs == "model":
        why = f"allocation {allocation.name} needs passes over the whole model"
    if why is None:
        return None
    return (
        f"--stream has one block in memory, and {why}: use method rsparse, teal, wina, topk, statistical-topk, or "
        "larosa with rotation layer, and allocation uniform, greedy or larosa; or leave --stream out"
    )


class _Run:
    """One process' part of a conversion, of which the journal says what earlier ones have done."""

    def __init__(
        self,
        model: PreTrainedModel,
        source: Source,
        device: torch.device,
        method: Method,
        allocation: Allocation,
        calibration: Calibration,
        evaluation: Evaluation | None,
        partial: Partial,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.source, self.partial, self.say = model, source, partial, say
        self.blockwise = BlockwiseModel(model, source, device)
        self.converter = BlockConverter(self.blockwise, method, allocation, calibration)
        self.calibration, self.evaluation = calibration, evaluation
        self.shards = Shards(model, partial)
        windows = [calibration.tokens[i : i + 1] for i in range(len(calibration.tokens))]
        self.batches: dict[str, Sequence[Tensor]] = {CALIBRATION: windows}
        if evaluation is not None:
            self.batches |= dict.fromkeys((DENSE, SPARSE), evaluation.batches(model))

    def fingerprint(self, spec: str, settings: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Returns all that the files depend on."""
        device = self.blockwise.device
        evaluated = [batch.tolist() for batch in self.batches.get(DENSE, ())]
        return {
            "model": spec,
            **{f"source file {name}": state for name, state in self.source.state.items()},
            "dtype": str(self.model.dtype),
            "method": f"{self.converter.bound.name} {asdict(self.converter.bound)}",
            "allocation": f"{self.converter.allocation.name} {asdict(self.converter.allocation)}",  # type: ignore[call-overload]
            **{f"calibration {key}": value for key, value in self.calibration.fingerprint.items()},
            "evaluation sha256": hashlib.sha256(repr(evaluated).encode()).hexdigest(),
            **{f"setting {key}": value for key, value in settings.items()},
            **options,
            "sparsify": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "native kernels": library.load() is not None,
        }

    def convert(self, journal: Journal, progress: Progress | None) -> SparsifyConfig:
        """Converts all blocks that the journal does not have yet; returns the configuration of all, and measures."""
        total = self.shards.layout.units
        self.shards.check_room(len(journal.units))
        self._check_last(journal)
        with Interruption(lambda: self.say("stopping after this block; Ctrl-C again stops at once")) as stop:
            for unit in range(len(journal.units), total):
                if stop.asked:
                    raise _interrupted(f"after {max(unit - 1, 0)} of {total - 1} blocks")
                self._make(unit, journal)
                if progress is not None:
                    progress("convert", unit + 1, total)
        linears = {name: LinearEntry(**entry) for unit in journal.units for name, entry in unit.linears.items()}
        config = self.converter.config(linears)
        add_sparse_layers(self.model, config)
        self.model.config.quantization_config = config
        self._measure(journal)
        return config

    def assemble(self, journal: Journal) -> None:
        """Makes the checkpoint's weight files."""
        self.say(f"writing {self.partial.out}")
        self.partial.empty_checkpoint([self.shards.path(unit) for unit in range(len(journal.units))])
        self.shards.assemble(journal.units)

    def seal(self, journal: Journal) -> None:
        """Writes the manifest, looks at everything once more, syncs it, and marks the conversion complete."""
        write_manifest(self.partial.checkpoint)
        self.shards.check_written(journal.units)
        self.source.check()
        settle(self.partial.checkpoint)
        journal.complete = True
        self.partial.write(journal)

    def _make(self, unit: int, journal: Journal) -> None:
        """Makes a unit of the model and journals it, then drops the hidden states that nobody needs any more."""
        self.source.check()
        before = self._carried(journal)
        paths = {name: self.partial.units / f"carried-{unit:05d}-{name}" for name in self.batches}
        after = {name: Carried(path, self.batches[name]) for name, path in paths.items()}
        linears: dict[str, Any] = {}
        densities: dict[str, float] = {}
        with self.source.hashing() as digest:
            if unit == 0:
                record = self.shards.copy_rest(self.source)
                for name, states in after.items():
                    self.blockwise.embed(self.batches[name], states)
            else:
                with self.blockwise.block(unit - 1) as block:
                    with self.blockwise.carrying(before[CALIBRATION], after[CALIBRATION]):
                        entries = self.converter.convert(unit - 1)
                    linears = {name: asdict(entry) for name, entry in entries.items()}
                    densities = self._evaluate(before, after)
                    record = self.shards.write_block(unit - 1, block)
        self.source.check()
        journal.units.append(
            Unit(self.shards.path(unit).name, record.bytes, record.sha256, digest.hexdigest(), linears, densities)
        )
        journal.carried = {name: asdict(states.seal()) for name, states in after.items()}
        for states in (*before.values(), *after.values()):
            states.close()
        self.partial.commit(journal)
        give_back()

    def _carried(self, journal: Journal) -> dict[str, Carried]:
        return {
            name: reopen(self.partial.units, CarriedRecord(**record), self.batches[name])
            for name, record in journal.carried.items()
        }

    def _evaluate(self, before: Mapping[str, Carried], after: Mapping[str, Carried]) -> dict[str, float]:
        """Carries the evaluation text through the block that was just converted, dense and sparse."""
        if self.evaluation is None:
            return {}

        def run(stream: str) -> None:
            with self.blockwise.carrying(before[stream], after[stream]):
                for batch in self.batches[stream]:
                    self.blockwise.run(batch)

        with dense(self.model):
            run(DENSE)
        return self.evaluation.densities(self.model, lambda: run(SPARSE))

    def _measure(self, journal: Journal) -> None:
        if self.evaluation is None:
            return
        densities = {name: value for unit in journal.units for name, value in unit.densities.items()}
        carried = self._carried(journal)
        final = _BothStates(self.model, carried[DENSE], carried[SPARSE])
        with self.blockwise.with_head(), self.blockwise.carrying(final, None):
            journal.measured = self.evaluation.measure(self.model, densities)
        for states in carried.values():
            states.close()

    def _check_last(self, journal: Journal) -> None:
        """Raises SparsifyError where the source of the last finished unit has other bytes now than it was made from."""
        if not journal.units:
            return
        with self.source.hashing() as digest:
            self.shards.read_again(len(journal.units) - 1, self.source)
        if digest.hexdigest() != journal.units[-1].source_sha256:
            raise SparsifyError(
                f"the source was changed since block {len(journal.units) - 1} was converted: the tensors in "
                f"{self.source.folder} have other bytes; remove {self.partial.folder} and convert again"
            )


class _BothStates:
    """The hidden states of the dense or the sparse model, whichever the model is set to run as."""

    def __init__(self, model: PreTrainedModel, dense_states: States, sparse_states: States) -> None:
        self._switch, self._dense, self._sparse = switch_of(model), dense_states, sparse_states

    def load(self, batch: Tensor, device: torch.device) -> Tensor:
        return (self._sparse if self._switch.sparse else self._dense).load(batch, device)


def _interrupted(where: str) -> InterruptedConversionError:
    return InterruptedConversionError(f"interrupted {where}: the same command with --resume goes on from there")


@contextmanager
def _problems(out: Path) -> Iterator[None]:
    """Turns what stops a conversion, and leaves what is finished, into one error that says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise _interrupted("at once; what was finished is kept") from None
    except OSError as problem:
        if not is_disk_full(problem):
            raise UnavailableError(f"{out} could not be written: {problem}; --resume goes on") from problem
        raise UnavailableError(f"the disk is full: {out} is unfinished; free some room and --resume") from problem
