"""The cells of `sparsify compare` as Markdown: a section for each model, text, protocol and calibration.

The best method of a column is bold; a missing cell is a dash; what was refused has its reason below the tables.
Not covered: plots (`comparison_plot`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsify.evals.cells import Cell
from sparsify.evals.comparison_summary import (
    BASELINE,
    Entry,
    Section,
    Spread,
    generated,
    kl,
    perplexity,
    realised_sparsity,
    sections,
    top1_agreement,
)

_DASH = "–"


@dataclass(frozen=True)
class _Metric:
    """One table's numbers; best is min or max, None where no value is better than another."""

    title: str
    value: Callable[[Cell], float | None]
    form: Callable[[float], str]
    best: Callable[..., float] | None
    dense: Callable[[Cell], float | None] | None = None


@dataclass
class _Notes:
    """The reasons of refused cells, numbered in the order in which they are met."""

    reasons: dict[str, int] = field(default_factory=dict)

    def mark(self, entry: Entry) -> str:
        marks = {self.reasons.setdefault(reason, len(self.reasons) + 1) for reason in entry.refused}
        return "".join(f" [{mark}]" for mark in sorted(marks))

    def lines(self) -> Iterator[str]:
        for reason, number in self.reasons.items():
            yield f"- [{number}] refused: {reason}"


def render(cells: list[Cell]) -> str:
    """Returns the whole document."""
    return "\n\n".join("\n".join(_section(section)) for section in sections(cells)) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield from _head(section)
    if not section.entries:
        return
    notes = _Notes()
    teal = any(method == BASELINE for method in section.methods)
    brackets = "; in brackets the rise in log-perplexity relative to TEAL's" if teal else ""
    metrics = [
        _Metric(f"Perplexity{brackets}", perplexity, _perplexity_form, min),
        _Metric("KL(dense ‖ sparse), nats per token", kl, "{:.4f}".format, min),
        _Metric("Top-1 agreement with the dense model", top1_agreement, "{:.1%}".format, max),
        _Metric("Realised sparsity", realised_sparsity, "{:.1%}".format, None),
    ]
    for metric in metrics:
        ratio = section.ratio_to_teal if teal and metric.value is perplexity else None
        yield from ("", f"{metric.title}:", "", *_matrix(section, metric, notes, ratio))
    yield from ("", *_details(section))
    yield from _generation(section, notes)
    if notes.reasons:
        yield from ("", *notes.lines())


def _head(section: Section) -> Iterator[str]:
    key, calibration = section.key, section.key["calibration"]
    yield f"## {key['model']}, {key['protocol']}"
    yield ""
    if section.dense is not None:
        quality = section.dense["result"]["quality"]
        bos = "BOS first" if key["bos"] else "no BOS"
        yield (
            f"Dense: perplexity {quality['perplexity']:.4f}, {quality['bits_per_byte']:.4f} bits per byte, on "
            f"{quality['tokens']:,} tokens ({quality['bytes']:,} bytes) of {key['text']} in {key['windows']} "
            f"windows of {key['seq_len']} tokens, {bos}, stride {key['stride']}. "
            f"Scored: {quality['scored']}. Dtype {quality['dtype']}, on {key['device']}."
        )
    if calibration is not None:
        yield (
            f"Calibrated on {calibration['sequences']} windows of {calibration['seq_len']} tokens of "
            f"{calibration['source']}. {_seeds(section)} Bold: the best of a column."
        )
    yield (
        f"Weights SHA-256 {key['model_sha256'][:12]}, evaluation text {key['text_sha256'][:12]}, "
        f"sparsify {key['sparsify_version']}."
    )


def _seeds(section: Section) -> str:
    if section.seeds < 2:
        return "One calibration seed: no spread is known."
    return f"Mean ± standard deviation over {section.seeds} seeds, which draw the calibration windows."


def _matrix(
    section: Section, metric: _Metric, notes: _Notes, ratio: Callable[[str, float], float | None] | None = None
) -> Iterator[str]:
    """Yields a table of methods by budgets."""
    budgets = section.sparsities
    spreads = {
        (method, budget): section.spread(method, budget, metric.value)
        for method in section.methods
        for budget in budgets
    }
    best = {budget: _best(metric, [spreads[m, budget] for m in section.methods]) for budget in budgets}
    yield "| method | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |"
    yield "|---" * (len(budgets) + 1) + "|"
    if metric.dense is not None and section.dense is not None:
        value = metric.dense(section.dense)
        yield f"| dense | {' | '.join([_DASH if value is None else metric.form(value)] * len(budgets))} |"
    for method in section.methods:
        texts = []
        for budget in budgets:
            spread = spreads[method, budget]
            text = _cell(section, section.entries.get((method, budget)), spread, metric, notes)
            if spread is not None and ratio is not None:
                share = ratio(method, budget)
                text += f" ({_DASH if share is None else f'{share:.2f}'})"
            texts.append(f"**{text}**" if spread is not None and spread.mean == best[budget] else text)
        yield f"| {method} | " + " | ".join(texts) + " |"


def _best(metric: _Metric, spreads: list[Spread | None]) -> float | None:
    """Returns the best mean of a column, None where nothing is to choose from."""
    means = [s.mean for s in spreads if s is not None and math.isfinite(s.mean)]
    return metric.best(means) if metric.best is not None and len(means) > 1 else None


def _cell(section: Section, entry: Entry | None, spread: Spread | None, metric: _Metric, notes: _Notes) -> str:
    if entry is None:
        return _DASH
    if spread is None:
        return f"refused{notes.mark(entry)}" if not entry.cells else _DASH
    text = metric.form(spread.mean)
    if spread.std is not None:
        text += f" ± {metric.form(spread.std)}"
    if spread.seeds < section.seeds:
        text += f", {spread.seeds} of {section.seeds} seeds{notes.mark(entry)}"
    return text


def _details(section: Section) -> Iterator[str]:
    """Yields a row for each method and budget: bytes, drift of the densities, rank."""
    yield (
        "Bytes and drift. Drift is realised minus calibrated density of a linear's channels, in percentage points: the "
        "mean over linears, and the linear that is furthest off in any seed. The rest are means over seeds."
    )
    yield ""
    yield "| method | budget | weighted | realised | mean drift | worst drift | bits/byte | mean rho | with a rank |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for method in section.methods:
        for budget in section.sparsities:
            entry = section.entries.get((method, budget))
            if entry is not None and entry.cells:
                yield _detail(entry)


def _detail(entry: Entry) -> str:
    results = [cell["result"] for cell in entry.cells]
    drifts = [result["drift"] for result in results if result["drift"] is not None]
    worst = max((drift["worst"] for drift in drifts), key=lambda worst: abs(worst["drift"]), default=None)
    columns = [
        entry.method,
        f"{entry.sparsity:.0%}",
        f"{_mean(results, lambda r: r['weighted_sparsity']):.1%}",
        f"{_mean(results, lambda r: r['realised_sparsity']):.1%}",
        f"{100 * _mean(drifts, lambda drift: drift['mean']):+.1f}" if drifts else _DASH,
        f"{100 * worst['drift']:+.1f} {worst['linear']}" if worst else _DASH,
        f"{_mean(results, lambda r: r['quality']['bits_per_byte']):.4f}",
        f"{_mean(results, lambda r: sum(e['rho'] for e in r['linears']) / len(r['linears'])):.3f}",
        f"{_mean(results, lambda r: sum(e['rank'] > 0 for e in r['linears'])):.0f} of {len(results[0]['linears'])}",
    ]
    return "| " + " | ".join(columns) + " |"


def _generation(section: Section, notes: _Notes) -> Iterator[str]:
    """Yields the tables of the generation check, nothing where no cell has one."""
    checks = [c["generation"] for e in section.entries.values() for c in e.cells if "generation" in c]
    if not checks:
        return
    settings = checks[0]["settings"]
    yield ""
    yield (
        f"Generation: greedy continuations of {settings['prompts']} prompts of at most {settings['prompt_tokens']} "
        f"tokens of the evaluation text, {settings['new_tokens']} new tokens each, run as a checkpoint runs them (by "
        "default the prompt sparse, too), whatever the protocol above."
    )
    metrics = [
        _Metric("Tokens until a continuation parts from the dense one, mean", generated("agreement"), _one_digit, max),
        _Metric("Repeated 4-grams", generated("repetition"), "{:.1%}".format, None, generated("repetition")),
        _Metric(
            "Perplexity of what was written under the dense model",
            generated("perplexity"),
            _perplexity_form,
            None,
            generated("perplexity"),
        ),
    ]
    for metric in metrics:
        yield from ("", f"{metric.title}:", "", *_matrix(section, metric, notes))


def _mean(results: list[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> float:
    return sum(map(value, results)) / len(results)


def _perplexity_form(value: float) -> str:
    return f"{value:.3f}" if value < 1e4 else f"{value:.2e}"


def _one_digit(value: float) -> str:
    return f"{value:.1f}"
