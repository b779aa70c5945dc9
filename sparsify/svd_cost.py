"""What a machine does in a second, and what a truncated SVD costs there: its time and the memory that it works in."""

from dataclasses import dataclass

from sparsify.budget import LinearShape
from sparsify.low_rank import is_exact, sketch_columns


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second: FLOP of products in the model's dtype, in fp32 and in fp64, with as many
    tokens as a window has; FLOP of an exact SVD and of QR; values of an elementwise pass; scores counted; bytes hashed.
    """

    model: float
    single: float
    double: float
    svd: float
    qr: float
    values: float
    scores: float
    hashed: float


def svd_seconds(shape: LinearShape, rank: int, svd: str, rates: Rates) -> float:
    """Returns the time of one decomposition (sparsify.low_rank) at this rank; 0 for rank 0."""
    if not rank:
        return 0.0
    larger, smaller = max(shape.outputs, shape.inputs), min(shape.outputs, shape.inputs)
    if is_exact(svd, shape.outputs, shape.inputs, rank):
        return svd_flops(larger, smaller) / rates.svd
    columns = sketch_columns(rank)
    products = 8.0 * 2.0 * larger * smaller * columns
    orthonormal = 7.0 * 2.0 * (shape.outputs + shape.inputs) * columns**2
    last = 2.0 * columns**2 * shape.inputs + svd_flops(columns, columns)
    return products / rates.single + orthonormal / rates.qr + last / rates.double


def svd_flops(larger: int, smaller: int) -> float:
    """Returns the operations of an SVD with both factors, by Golub and Van Loan: 4 m n² + 22 n³."""
    return 4.0 * larger * smaller**2 + 22.0 * smaller**3


def svd_bytes(shape: LinearShape, rank: int, svd: str) -> int:
    """Returns the memory that one decomposition works in, its result included; 0 for rank 0."""
    if not rank:
        return 0
    outputs, inputs = shape.outputs, shape.inputs
    smaller = min(outputs, inputs)
    if is_exact(svd, outputs, inputs, rank):
        # The weight in fp64 and LAPACK's copy, U and Vᵀ, and its work space.
        return 8 * (2 * outputs * inputs + (outputs + inputs) * smaller + 5 * smaller * smaller)
    columns = sketch_columns(rank)
    # The weight in fp32; sketch, bases and their QR in fp32; the factors in fp64.
    return 4 * outputs * inputs + 4 * 3 * columns * (outputs + inputs) + 8 * columns * (outputs + 2 * inputs)
