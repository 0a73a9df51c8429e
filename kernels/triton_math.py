"""Functions that several Triton kernels call.

Triton is not installed everywhere, so only Triton modules import this one.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Returns tanh x and 1 - tanh^2 x, both to a few units in the last place.

    Near 0, where 1 - exp(-2|x|) cancels, tanh is a series.
    """
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    y = x * x
    series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 + y * (-1382 / 155925)))))
    value = tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -far, far))
    return value, 4 * e / ((1 + e) * (1 + e))


@triton.jit
def logit(raw, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """Returns softcap * tanh(raw / softcap) / temperature and its derivative in raw."""
    if HAS_SOFTCAP:
        value, slope = tanh(raw / softcap)
        return value * softcap / temperature, slope / temperature
    else:
        return raw / temperature, 1 / temperature
