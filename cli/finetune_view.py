"""What a finetuning shows while it runs, on stderr: a live table on a terminal, a log line every few seconds otherwise.

Shown are the step, λ, the language model's loss and the regulariser, tokens a second, the time left and the share of
zeros that enters each down projection.
"""

import sys
import time
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sparsify.cli.output import common_prefix, percent, seconds

if TYPE_CHECKING:
    from sparsify.training.trainer import Moment

_SECONDS_BETWEEN_LINES = 5.0
_BAR = 24
# Rows that fit below the head: of deeper models, as many layers evenly spread.
_ROWS = 16


class FinetuneView:
    """Takes moments, as sparsify.training.finetune calls them, and notes; quiet says nothing (other processes)."""

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic, quiet: bool = False
    ) -> None:
        self._stream, self._clock, self._quiet = stream or sys.stderr, clock, quiet
        console = Console(file=self._stream, highlight=False)
        # Also where the screen is a terminal that cannot move its cursor, lines are right.
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal and not quiet else None
        self._due = clock()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, message: str) -> None:
        """Says what goes on where there is nothing to count."""
        if self._live is not None:
            self._live.console.print(message, highlight=False, style="dim", markup=False)
        elif not self._quiet:
            self._line(message)

    def see(self, moment: "Moment") -> None:
        """Shows the state of the training."""
        if self._live is not None:
            self._live.update(_picture(moment), refresh=True)
        elif not self._quiet and (self._clock() >= self._due or moment.step == moment.steps):
            self._line(line_of(moment))
            self._due = self._clock() + _SECONDS_BETWEEN_LINES

    def _line(self, message: str) -> None:
        self._stream.write(f"{datetime.now().strftime('%H:%M:%S')} {message}\n")
        self._stream.flush()


def line_of(moment: "Moment") -> str:
    """Returns a moment as one line of a log."""
    layers = " ".join(f"{100 * share:.0f}" for share in moment.sparsity.values())
    return (
        f"step {moment.step}/{moment.steps}: loss {moment.lm_loss:.4f}, L1 {moment.regulariser:.4g} × λ "
        f"{moment.factor:.4g}{_divergence(moment)}, zeros {percent(moment.mean_sparsity)} ({layers}), "
        f"{moment.tokens_per_second:,.0f} tokens/s, about {seconds(moment.seconds_left)} left"
    )


def _divergence(moment: "Moment") -> str:
    return "" if moment.distillation is None else f", KL {moment.distillation:.4f}"


def _picture(moment: "Moment") -> Group:
    head = Text.assemble(
        (f"step {moment.step}/{moment.steps}", "bold"),
        f"  {moment.tokens:,} tokens, {moment.tokens_per_second:,.0f} a second, about "
        f"{seconds(moment.seconds_left)} left\n",
        f"loss {moment.lm_loss:.4f}{_divergence(moment)}   L1 {moment.regulariser:.4g} × λ {moment.factor:.4g} = "
        f"{moment.regulariser * moment.factor:.4g}\n",
        f"learning rate {moment.learning_rate:.2e}   zeros {percent(moment.mean_sparsity)}",
    )
    rows = Table.grid(padding=(0, 1))
    prefix = common_prefix(list(moment.sparsity))
    names = list(moment.sparsity)
    for name in names[:: max(1, -(-len(names) // _ROWS))]:
        share = moment.sparsity[name]
        full = round(_BAR * share)
        rows.add_row(name.removeprefix(prefix), Text("█" * full + "░" * (_BAR - full)), percent(share))
    return Group(head, rows)
