"""The story of a conversion: targets → choose (channels, neurons, or what ReLUs leave) → swap → describe."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sparsify import __version__
from sparsify.allocation import Allocation
from sparsify.calibration import Calibration, Progress
from sparsify.channel_conversion import choose_channels, swap_channels
from sparsify.config import CalibrationEntry, LinearEntry, SparsifyConfig
from sparsify.errors import SparsifyError
from sparsify.linear import SparsitySwitch
from sparsify.methods import AnyMethod, Method, NeuronMethod, options_of
from sparsify.methods.relu import Relu
from sparsify.models import check_context
from sparsify.neuron_conversion import convert_neurons
from sparsify.plugin import attach
from sparsify.relu_conversion import convert_relu
from sparsify.runtime import sparse_layers
from sparsify.targets import Targets, find_targets, linear_shapes


def convert(
    model: PreTrainedModel,
    method: AnyMethod,
    calibration: Calibration,
    *,
    allocation: Allocation | str | None = None,
    rotate: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Converts the model in place and returns it; its weights are kept, not copied.

    allocation: how the budget is spent over the linears, by name or with its own options (sparsify.allocation); None
    for the method's own, which is uniform for all but auto and larosa.
    rotate: turn the model's residual stream first (sparsify.rotation.rotate), whatever the method; its weights change
    then, and not what it computes; a conversion that is refused later leaves it rotated.

    The linears of its blocks become sparse layers, and model.config.quantization_config a SparsifyConfig.
    Raises SparsifyError for a model that is converted or quantised already, or one whose budget cannot be met.
    """
    refuse_converted(model)
    check_tokens(model, calibration.tokens)
    targets = find_targets(model, calibration.tokens[:1, :8])
    shapes = linear_shapes(model, targets)
    if isinstance(method, Relu):
        return convert_relu(
            model, method, calibration, targets, shapes, allocation=allocation, rotate=rotate, progress=progress
        )
    if isinstance(method, NeuronMethod):
        return convert_neurons(model, method, calibration, targets, shapes, allocation=allocation, progress=progress)
    channels = choose_channels(
        model, method, calibration, targets, shapes, allocation=allocation, rotate=rotate, progress=progress
    )
    swap_channels(model, channels, SparsitySwitch())
    config = channel_config(
        method.bind(shapes),
        calibration,
        targets,
        channels.entries(),
        allocation=channels.allocation,
        rotated=channels.rotated,
    )
    attach(model, config)
    return model


def channel_config(
    method: Method,
    calibration: Calibration,
    targets: Targets,
    linears: dict[str, LinearEntry],
    *,
    allocation: str,
    rotated: bool,
) -> SparsifyConfig:
    """Returns the configuration of a model whose channels a bound method has chosen."""
    return SparsifyConfig(
        sparsify_version=__version__,
        method=method.name,
        # Not named where it is off: an older sparsify's methods do not know it.
        method_config={
            key: value for key, value in options_of(method).items() if (key, value) != ("compensate", False)
        },
        prefill="sparse",
        sites=[list(site.names) for site in targets.sites],
        left_dense=list(targets.left_dense),
        calibration=CalibrationEntry(**calibration.fingerprint),
        linears=linears,
        allocation=allocation,
        rotated=rotated,
    )


def refuse_converted(model: PreTrainedModel) -> None:
    """Raises SparsifyError for a model that is converted or quantised already."""
    if sparse_layers(model):
        raise SparsifyError("this model is converted already: convert the dense model it was made from")
    if getattr(model, "is_quantized", False):
        raise SparsifyError("this model is quantised: sparsify converts models with floating-point weights")


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raises SparsifyError for calibration tokens that the model cannot take."""
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < rows:
            raise SparsifyError(
                f"the calibration holds token id {token}, outside this model's vocabulary of {rows}: "
                "it was made with another model's tokenizer"
            )
    check_context(model, tokens.shape[1])
