"""The one tolerance table of the tests, in units of rounding, and the comparison that applies it.

An error is measured against the float64 oracle, which got the very same (already rounded) inputs. It may have two parts:

- arithmetic: so many units of roundoff of the dtype that computes (float64 for float64 inputs, float32 for all
  others), relative to the largest value of the channel, because sums cancel and single elements can be near zero;
- storage: half a unit in the last place of a result that is kept in 16 bits, relative to the element itself.

Where the numbers come from: a responsibility is exp(l), so its relative error is |l| times the roundoff, with |l| up to
about 30 where it still matters; the derivative multiplies by l' = (x - mu)/var, another factor of up to 10. Sums
over a channel's P points are blocked or pairwise and add log2(P), below 20 here. The largest errors of the eager
formula on the case table stand beside each row; the allowance is about four times that. In joint mode l is a sum
over the channels, so its magnitude, and with it the allowance, grows with their number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Allowed errors in units of roundoff: of one element, in relative L2, and of the mean (the bias)."""

    element: float
    l2: float
    bias: float


TOLERANCES = {
    "output": Tolerance(element=60, l2=12, bias=8),  # measured 15, 3.3, 2.1
    "grad_input": Tolerance(element=100, l2=40, bias=8),  # measured 27, 10, 1.7
    "grad_affine": Tolerance(element=200, l2=35, bias=28),  # measured 64, 8.7, 6.9
    "statistics": Tolerance(element=12, l2=5, bias=4),  # measured 3, 1.3, 1.0
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics have for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def errors(actual: Tensor, expected: Tensor, computed: torch.dtype) -> Tolerance:
    """The three errors of `actual` against float64 `expected` in roundoffs of `computed`, storage rounding taken off.

    Tensors of two or more dimensions have their channels in dimension 1: (N, C, S...) or (M, C).
    """
    actual, expected = actual.detach(), expected.detach()
    stored = torch.finfo(actual.dtype)
    error = actual.double() - expected
    magnitude = expected.abs()
    channels = [d for d in range(expected.ndim) if d != 1]
    scale = magnitude.amax(channels, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    storage = torch.zeros_like(magnitude)
    if actual.dtype != computed:
        # A subnormal of float16 is rounded to a multiple of the smallest one, not relative to itself.
        storage = (magnitude * roundoff(actual.dtype)).clamp(min=stored.smallest_normal * stored.eps / 2)
    unit = roundoff(computed)
    element = ((error.abs() - storage).clamp(min=0) / scale).max()
    l2 = (error.norm() - storage.norm()).clamp(min=0) / magnitude.norm().clamp(min=scale.max() * 1e-6)
    # Roundings to storage are as often up as down: their sum grows like the root of their number; 4 sigma.
    bias = (error.sum().abs() - 4 * storage.norm()).clamp(min=0) / magnitude.sum().clamp(min=scale.max() * 1e-6)
    return Tolerance(*(float(e) / unit for e in (element, l2, bias)))


def assert_close(
    actual: Tensor, expected: Tensor, quantity: str, input_dtype: torch.dtype, amplification: float = 1
) -> None:
    """Fail unless `actual`, from an input of `input_dtype`, equals the float64 `expected` within the table's row."""
    assert actual.shape == expected.shape, f"{quantity}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{quantity}: not finite"
    if actual.numel() == 0:
        return
    measured, allowed = errors(actual, expected, compute_dtype(input_dtype)), TOLERANCES[quantity]
    for name in ("element", "l2", "bias"):
        value, limit = getattr(measured, name), getattr(allowed, name) * amplification
        assert value <= limit, f"{quantity}: {name} error of {value:.1f} roundoffs, allowed {limit}"
