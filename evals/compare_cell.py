"""The measurements of one conversion in a comparison: one pass over the evaluation windows a protocol.

Perplexity, divergence from the dense model and realised density come from the same forwards; the generation check,
where it is asked for, is made once a conversion and stands in each protocol's cell.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from sparsify.conversion import convert
from sparsify.errors import SparsifyError, UnavailableError
from sparsify.evals.cells import Cell
from sparsify.evals.compare_labels import parse_allocation, parse_method, parse_rotate
from sparsify.evals.compare_subject import LoadedSubject
from sparsify.evals.divergence import Divergence
from sparsify.evals.generation_check import compare_continuations, continue_greedily
from sparsify.evals.perplexity import perplexity
from sparsify.evals.realised import RealisedDensity
from sparsify.ledger import ledger_of

DENSE = "dense"


def measured(loaded: LoadedSubject, cells: list[Cell]) -> Iterator[Cell]:
    """Yields the cells, which differ in their protocol only, with what they lack: "result" and "generation".

    What the method or the budget refuses is yielded with "refused" and the reason in their place.
    Raises SparsifyError where the dense model itself cannot be measured, UnavailableError where the machine fails.
    """
    key = cells[0]["key"]
    is_dense = key["method"] == DENSE
    model = loaded.load()
    started = time.perf_counter()
    try:
        if not is_dense:
            method, allocation = parse_method(key["method"], key["sparsity"]), parse_allocation(key["method"])
            rotate = parse_rotate(key["method"])
            convert(model, method, loaded.calibrations[key["seed"]], allocation=allocation, rotate=rotate)
    except UnavailableError:
        raise
    except SparsifyError as error:
        yield from ({"key": cell["key"], "refused": str(error)} for cell in cells)
        return
    took = {"convert_seconds": round(time.perf_counter() - started, 1)}
    generation: dict[str, Any] = {}
    for cell in cells:
        try:
            if "result" not in cell:
                cell = cell | {"result": _result(model, loaded, cell["key"]["protocol"]) | took}
            if loaded.settings.generation is not None and not generation:
                generation = {"generation": _generation(model, loaded)}
        except SparsifyError as error:
            if is_dense or isinstance(error, UnavailableError):
                raise
            cell = {"key": cell["key"], "refused": str(error)}
        else:
            cell = cell | generation
        yield cell


def _result(model: PreTrainedModel, loaded: LoadedSubject, protocol: str) -> dict[str, Any]:
    started = time.perf_counter()
    divergence = Divergence(model, protocol)
    with RealisedDensity(model) as realised:
        quality = perplexity(
            model, loaded.windows, protocol=protocol, batch_size=loaded.settings.batch_size, see=divergence.see
        )
    result: dict[str, Any] = {"quality": quality.to_dict(), "divergence": divergence.to_dict()}
    if quality.sparse:
        result |= _sparsity(model, realised)
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def _sparsity(model: PreTrainedModel, realised: RealisedDensity) -> dict[str, Any]:
    """Returns the ledger's three sparsities, and each linear's budget with its density calibrated and realised."""
    ledger, densities = ledger_of(model), realised.densities()
    counted = ledger.with_densities(densities)
    entries = model.config.quantization_config.linears
    return {
        "nominal_sparsity": ledger.nominal_sparsity,
        "weighted_sparsity": ledger.weighted_sparsity,
        "realised_sparsity": counted.weighted_sparsity,
        "realised_model_sparsity": counted.model_sparsity,
        "drift": _drift({name: density - entries[name].density for name, density in densities.items()}),
        "linears": [
            {"name": linear.name, "shape": [linear.outputs, linear.inputs]}
            | {key: value for key, value in asdict(entries[linear.name]).items() if value is not None}
            | {"realised_density": densities.get(linear.name)}
            for linear in ledger.linears
        ],
    }


def _drift(drifts: dict[str, float]) -> dict[str, Any] | None:
    """Returns the mean of realised minus calibrated density over linears, and the linear furthest from 0."""
    if not drifts:
        return None
    worst = max(drifts, key=lambda name: abs(drifts[name]))
    return {"mean": sum(drifts.values()) / len(drifts), "worst": {"linear": worst, "drift": drifts[worst]}}


def _generation(model: PreTrainedModel, loaded: LoadedSubject) -> dict[str, Any]:
    settings = loaded.settings.generation
    assert settings is not None
    baseline = loaded.dense_continuations(model, settings)
    return compare_continuations(baseline, continue_greedily(model, baseline.prompts, settings), settings)
