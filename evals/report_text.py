"""Numbers as a report prints them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"


def share(value: float | None, digits: int = 1) -> str:
    """Returns 0.5 as "50.0%"."""
    return NONE if value is None else f"{100 * value:.{digits}f}%"


def size(value: float | None) -> str:
    """Returns bytes in decimal units, "11.5 MB"."""
    if value is None:
        return NONE
    power = min(int(math.log10(max(value, 1.0)) // 3), 4)
    return f"{value / 1000**power:.{0 if power == 0 else 2}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def perplexity(value: float) -> str:
    return f"{value:.3f}" if value < 1e4 else f"{value:.2e}"


def task_score(side: Mapping[str, Any] | None) -> str:
    """Returns "0.6000 ± 0.2449" of a task's value and stderr; of values of a thousand and more, three digits."""
    if side is None:
        return NONE
    value, error = side["value"], side["stderr"]
    if abs(value) < 1e3:
        return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
    return f"{value:.3g}" + ("" if error is None else f" ± {error:.1g}")


def place(name: str) -> tuple[int | None, str]:
    """Returns the layer and the projection of a linear's name: (3, "self_attn.q_proj"); None outside of layers."""
    match = re.search(r"\.(\d+)\.(.+)$", name)
    return (None, name) if match is None else (int(match[1]), match[2])


def settings(values: Mapping[str, Any]) -> str:
    """Returns "rho auto, score column-norm", with what is given linear by linear left out."""
    shown = {k: v for k, v in values.items() if v is not None}
    parts = [f"{k} {'linear by linear' if isinstance(v, Mapping) else v}" for k, v in shown.items()]
    return ", ".join(parts) or "none"


def listed(names: Sequence[str]) -> str:
    return ", ".join(names)
