"""What the kernels share: the score, activations and normalisation, with the roundings of transformers' modules."""

import triton
import triton.language as tl


@triton.jit
def kept(value, channel, inside, threshold, scale, SCALED: tl.constexpr):
    """keep = ¬(|value| · scale ≤ threshold) in fp32, so that a NaN is kept; false outside."""
    score = tl.abs(value)
    if SCALED:
        score = score * tl.load(scale + channel, mask=inside, other=0.0)
    return inside & ((score <= threshold) == 0)


@triton.jit
def load_input(x, up, at, inside, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """The inputs at these offsets in fp32: x, or act(x) · up where GATED; 0 outside."""
    value = tl.load(x + at, mask=inside, other=0.0)
    if GATED:
        value = activated(value, ACTIVATION) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty)
    return value.to(tl.float32)


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """act(gate) in fp32, rounded to the dtype of gate."""
    g = gate.to(tl.float32)
    if ACTIVATION == "silu":
        g = g / (1.0 + tl.exp(-g))
    elif ACTIVATION == "relu":
        g = tl.where(g <= 0.0, 0.0, g)
    elif ACTIVATION == "gelu":
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_pytorch_tanh")
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        # tanh(a) = 1 − 2 / (exp(2a) + 1), right at both ends.
        g = 0.5 * g * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    return g.to(gate.dtype).to(tl.float32)
