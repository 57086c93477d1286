"""The one tolerance table of the tests, in units of rounding, and the comparison that applies it.

Errors are measured against the float64 oracle, which got the very same (already rounded) inputs, and have two parts:

- arithmetic: so many units of roundoff of the dtype that computes (float64 for float64 inputs, float32 for all
  others), relative to the largest value of the channel, because sums cancel and single elements can be near zero;
- storage: half a unit in the last place of a result that is kept in 16 bits, relative to the element itself.

Where the numbers come from: a responsibility is exp(l), so its relative error is the absolute error of l, that is the
roundoff times the size of l's terms, tens where p still matters; the native operator evaluates l as a quadratic in x,
whose terms are larger than their sum. The derivative multiplies by l' = (x - mu)/var, another factor of up to 10. Sums
over a channel's P points are blocked or pairwise and add log2(P), below 20 here. Beside each row are the largest errors
of a thousand random shapes, layouts and numbers of components, of the reference and of the native operator; the
allowance is about two and a half times the latter. In joint mode l is a sum over the channels, so its size, and with it
the allowance, grows with their number.
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
    "output": Tolerance(element=250, l2=55, bias=40),  # 52, 5, 3; native 102, 23, 16
    "grad_input": Tolerance(element=800, l2=90, bias=18),  # 58, 12, 1; native 323, 35, 7
    "grad_affine": Tolerance(element=250, l2=85, bias=50),  # 27, 15, 7; native 98, 34, 20
    "statistics": Tolerance(element=420, l2=78, bias=25),  # 10, 3, 3; native 168, 31, 10
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics have for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def errors(
    actual: Tensor, expected: Tensor, computed: torch.dtype, storage_roundings: int = 1, usual: float = 0.0
) -> Tolerance:
    """The three errors of `actual` against float64 `expected` in roundoffs of `computed`, storage rounding taken off.

    Tensors of two or more dimensions have their channels in dimension 1: (N, C, S...) or (M, C).
    """
    actual, expected = actual.detach(), expected.detach()
    stored = torch.finfo(actual.dtype)
    error = actual.double() - expected
    magnitude = expected.abs()
    channels = [d for d in range(expected.ndim) if d != 1]
    # The channel's largest value, or, where all of a channel's are near zero, what is usual.
    usual = magnitude.square().mean().sqrt().clamp(min=max(usual, torch.finfo(torch.float32).tiny))
    scale = magnitude.amax(channels, keepdim=True).maximum(usual)
    storage = torch.zeros_like(magnitude)
    if actual.dtype != computed:
        # A subnormal of float16 is rounded to a multiple of the smallest one, not relative to itself.
        storage = storage_roundings * (magnitude * roundoff(actual.dtype)).clamp(
            min=stored.smallest_normal * stored.eps / 2
        )
    unit = roundoff(computed)
    element = ((error.abs() - storage).clamp(min=0) / scale).max()
    l2 = (error.norm() - storage.norm()).clamp(min=0) / (usual * magnitude.numel() ** 0.5)
    # Roundings to storage are as often up as down: their sum grows like the root of their number; 4 sigma.
    bias = (error.sum().abs() - 4 * storage.norm()).clamp(min=0) / magnitude.sum().maximum(usual)
    return Tolerance(*(float(e) / unit for e in (element, l2, bias)))


def assert_close(
    actual: Tensor,
    expected: Tensor,
    quantity: str,
    input_dtype: torch.dtype,
    amplification: float = 1,
    storage_roundings: int = 1,
    usual: float = 0.0,
) -> None:
    """Fail unless `actual`, from an input of `input_dtype`, equals the float64 `expected` within the table's row.

    `amplification` multiplies the row; `storage_roundings` is 2 where `expected` was rounded to 16 bits as well;
    `usual` is the size that values have, should all of `expected` be smaller by chance.
    """
    assert actual.shape == expected.shape, f"{quantity}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{quantity}: not finite"
    if actual.numel() == 0:
        return
    measured, allowed = (
        errors(actual, expected, compute_dtype(input_dtype), storage_roundings, usual),
        TOLERANCES[quantity],
    )
    for name in ("element", "l2", "bias"):
        value, limit = getattr(measured, name), getattr(allowed, name) * amplification
        assert value <= limit, f"{quantity}: {name} error of {value:.1f} roundoffs, allowed {limit}"
