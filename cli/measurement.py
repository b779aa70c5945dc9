"""One model on one text: its dense perplexity and, where it is converted, the sparse one with realised sparsity."""

from typing import TYPE_CHECKING, Any

from sparsify.cli.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from sparsify.text import Windows


def measure(
    model: "PreTrainedModel",
    windows: "Windows",
    progress: Progress,
    *,
    label: str,
    protocol: str = "every-token",
    batch_size: int = 8,
    only_dense: bool = False,
    densities: "Mapping[str, float] | None" = None,
) -> dict[str, Any]:
    """Returns "dense" and, for a converted model, "sparse" perplexities on the same tokens, and what sparsity was.

    densities: what the layers kept on these tokens where that was counted before, None to count it here.
    """
    from sparsify.evals.perplexity import check_sparse_protocol, perplexity
    from sparsify.evals.realised import RealisedDensity
    from sparsify.ledger import ledger_of, rest_bytes
    from sparsify.runtime import dense, sparse_layers

    converted = bool(sparse_layers(model))
    if converted and not only_dense:
        check_sparse_protocol(model, protocol)
    with dense(model):
        stage = progress.stage(f"{label}, dense")
        baseline = perplexity(model, windows, protocol=protocol, batch_size=batch_size, progress=stage)
    result: dict[str, Any] = {"dense": baseline.to_dict()}
    if not converted:
        return result | {"dense_bytes_per_token": rest_bytes(model)}
    ledger = ledger_of(model)
    result["dense_bytes_per_token"] = ledger.dense_bytes + ledger.rest_bytes
    if only_dense:
        return result
    with RealisedDensity(model) as counted:
        stage = progress.stage(f"{label}, sparse")
        sparse = perplexity(model, windows, protocol=protocol, batch_size=batch_size, progress=stage)
    densities = counted.densities() if densities is None else dict(densities)
    realised = ledger.with_densities(densities)
    return result | {
        "sparse": sparse.to_dict(),
        "perplexity_ratio": sparse.perplexity / baseline.perplexity,
        "nominal_sparsity": ledger.nominal_sparsity,
        "weighted_sparsity": ledger.weighted_sparsity,
        "realised_sparsity": realised.weighted_sparsity,
        "realised_model_sparsity": realised.model_sparsity,
        "realised_densities": densities,
        "touched_bytes_per_token": realised.touched_bytes + realised.rest_bytes,
    }
