"""One NaN or infinity in the input: it is seen, and nowhere but where nn.BatchNorm2d shows it."""

import itertools
import math

import pytest
import torch

from python_tests.support.cases import Case, leaves, results_of

CHANNEL = 9  # in channels_last in the middle of a vector
# The first point of a channel is one of those that the sums' origin is chosen from.
POSITIONS = [(0, CHANNEL, 0, 0), (2, CHANNEL, 3, 4)]
BAD = [math.nan, math.inf, -math.inf]


def results(case, position=(), bad=None):
    """The results of a case, with one element of x replaced."""
    arguments = leaves(case.arguments("cuda"))
    if position:
        arguments.x.detach()[position] = bad
    return results_of(case, arguments)


def assert_other_channels_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        if a is not None:
            others = torch.arange(a.shape[1], device="cuda") != CHANNEL
            assert torch.equal(a[:, others], e[:, others])


pytestmark = [
    pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str),
    pytest.mark.parametrize("layout", ["contiguous", "channels_last"]),
    # Log-odds with and without a bound.
    pytest.mark.parametrize("data", ["mixed", "equal"]),
    pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"]),
]


def test_training_loses_the_channel(dtype, layout, data, fused, path):
    """All of its output and gradients, but for the bias's, which is weighted by the responsibilities."""
    form = {"activation": "relu", "residual": True} if fused else {}
    case = Case((3, 16, 6, 7), dtype=dtype, layout=layout, data=data, **form)
    undisturbed = results(case)
    for position, bad in itertools.product(POSITIONS, BAD):
        disturbed = results(case, position, bad)
        assert_other_channels_equal(disturbed, undisturbed)
        for lost in (disturbed.y, disturbed.grad_input, disturbed.grad_weight):
            assert lost[:, CHANNEL].isnan().all()
        for statistic in (disturbed.running_mean, disturbed.running_var):
            assert not statistic[:, CHANNEL].isfinite().any()


def test_evaluation_loses_the_element(dtype, layout, data, fused):
    """An infinity may stay one, as in nn.BatchNorm2d, or become NaN, as in the formula."""
    case = Case((3, 16, 6, 7), training=False, dtype=dtype, layout=layout, data=data, residual=fused)
    undisturbed = results(case)
    for position, bad in itertools.product(POSITIONS, BAD):
        disturbed = results(case, position, bad)
        assert_other_channels_equal(disturbed, undisturbed)
        others = torch.ones_like(undisturbed.y, dtype=torch.bool)
        others[position] = False
        for tensor, wanted in ((disturbed.y, undisturbed.y), (disturbed.grad_input, undisturbed.grad_input)):
            assert torch.equal(tensor[others], wanted[others])
        lost = disturbed.y[position]
        assert lost.isnan() if math.isnan(bad) else not lost.isfinite()
