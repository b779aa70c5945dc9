"""The labels of a comparison's methods: NAME[:OPTION=VALUE[,OPTION=VALUE]][@ALLOCATION].

Beside a method's own options there is `rotate=true` for every method: the model is rotated first (sparsify.rotation).
"""

from typing import Any

from sparsify.allocation import Allocation, get_allocation
from sparsify.errors import SparsifyError
from sparsify.methods import AnyMethod, get_method


def split_labels(text: str) -> list[str]:
    """Returns the labels of a list such as "teal,rsparse:rho=0.9,score=magnitude@greedy,wina".

    A comma separates options where "NAME=" without a colon follows it inside a label with options, else labels.
    """
    labels: list[str] = []
    for part in text.split(","):
        option = part.partition("=")[0]
        if labels and "=" in part and ":" not in option and ":" in labels[-1]:
            labels[-1] += f",{part}"
        else:
            labels.append(part.strip())
    return [label for label in labels if label]


def parse_method(label: str, sparsity: float) -> AnyMethod:
    """Returns the method of a label such as "teal" or "rsparse:rho=0.95,score=magnitude@greedy" at one sparsity."""
    name, options = _parts(label)
    options.pop("rotate", None)
    return get_method(name).configure(sparsity=sparsity, **options)


def parse_rotate(label: str) -> bool:
    """Returns whether the label asks for a rotated model. Raises SparsifyError for a value but true and false."""
    rotate = _parts(label)[1].get("rotate", False)
    if not isinstance(rotate, bool):
        raise SparsifyError(f"method {label!r}: rotate is {rotate!r}, it must be true or false")
    return rotate


def _parts(label: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = label.partition("@")[0].partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise SparsifyError(f"method {label!r} is not of the form NAME[:OPTION=VALUE[,OPTION=VALUE]][@ALLOCATION]")
        try:
            options[option] = float(value)
        except ValueError:
            options[option] = {"true": True, "false": False}.get(value, value)
    return name, options


def parse_allocation(label: str) -> Allocation | None:
    """Returns the allocation that a label names after its "@"; None, the method's own, where it names none."""
    name = label.partition("@")[2]
    return get_allocation(name) if name else None
