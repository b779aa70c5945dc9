"""Several processes that do one piece of work together, as `accelerate launch` or torchrun start them.

Each runs the model on a part of the windows, or measures a part of the cells; what they found is put together so that
the result is the one of a single process, bit for bit where the processes compute as that one does (the same kind of
device, the same number of threads). Not covered: one model in parts (sparsify.tensor_parallel).
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.launch import launched_count

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Processes:
    """This process, `index` of `count`; the first says and writes what there is to say and write."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    def part(self, windows: Tensor) -> Tensor:
        """Returns this process's windows of [N, S], in their order: [n, S] with n about N / count."""
        bounds = [len(windows) * index // self.count for index in (self.index, self.index + 1)]
        return windows[bounds[0] : bounds[1]]

    def gathered(self, own: Any) -> list[Any]:
        """Returns what each process has given, in their order."""
        if self.count == 1:
            return [own]
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([own])
        return found

    def total(self, counts: Tensor) -> Tensor:
        """Returns the sum of every process's counts, int64 of one shape: exact in any order."""
        if self.count == 1:
            return counts
        from accelerate import PartialState
        from accelerate.utils import reduce

        total: Tensor = reduce(counts.to(PartialState().device), reduction="sum")
        return total.to(counts.device)

    def agree(self, value: object, what: str) -> None:
        """Raises SparsifyError where the processes have different values, by their repr."""
        if len(set(self.gathered(repr(value)))) > 1:
            raise SparsifyError(
                f"the processes came to different {what}: they must run on devices of one kind, with as many threads; "
                "or convert in one process"
            )

    def wait(self) -> None:
        """Returns when every process is here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


ONE = Processes()


def launched(*, cpu: bool) -> Processes:
    """Returns the processes of this launch, connected to each other; ONE without a launcher. cpu: use no GPU.

    Raises SparsifyError where they cannot be connected.
    """
    if launched_count() < 2:
        return ONE
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    if state.num_processes != launched_count():
        raise SparsifyError(
            f"the launcher has started {launched_count()} processes, and accelerate cannot connect them on this "
            "device: use GPUs or --device cpu, or start one process"
        )
    return Processes(state.process_index, state.num_processes)


class WindowSums(Generic[K]):
    """Sums over windows of which each process sees a part, added in the order of the windows: a float sum has one."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._values: dict[K, list[Tensor]] = {}

    def add(self, key: K, value: Tensor) -> None:
        """Adds the next window's value, fp64 of any shape, to the sum of that key."""
        values = self._values.setdefault(key, [])
        if self._processes.count == 1 and values:
            values[0] = values[0] + value
        else:
            values.append(value)

    def totals(self) -> dict[K, Tensor]:
        """Returns the sums over the windows of all processes, on the device of this one's values."""
        device = next((values[0].device for values in self._values.values()), torch.device("cpu"))
        own = {key: torch.stack(values).cpu() for key, values in self._values.items()}
        totals: dict[K, Tensor] = {}
        for part in self._processes.gathered(own):
            for key, values in part.items():
                for value in values:
                    totals[key] = totals[key] + value if key in totals else value
        return {key: total.to(device) for key, total in totals.items()}
