"""Any shape, number of components, layout and dtype: hypothesis looks for one where a backend and the oracle differ."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from python_tests.support.cases import EPS, Case, assert_results, expected, run

layouts = st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@st.composite
def spatial_sizes(draw, least=1):
    """Nothing to three dimensions, 200 points at most."""
    return draw(st.lists(st.integers(least, 19), max_size=3).filter(lambda s: math.prod(s) <= 200))


@st.composite
def any_case(draw, modes):
    """A training or evaluation step on (N, C, S...)."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 35)), *draw(spatial_sizes()))
    components = draw(st.integers(1, 16))
    points = math.prod(shape) // shape[1]
    # Two points determine a group's statistics, and its gradient is zero: some group has three.
    mode = draw(st.sampled_from(modes if points >= 3 * components else [m for m in modes if m != "split"]))
    return Case(
        shape,
        components,
        mode,
        training=points > 1 and (mode == "split" or draw(st.booleans())),
        dtype=draw(dtypes) if enough(points, components, mode) else torch.float64,
        layout=draw(layouts),
        grad_layout=draw(layouts),
        affine=draw(st.booleans()),
        detach=mode != "split" and draw(st.booleans()),
    )


def enough(points, components, mode):
    """True where every component gets points to average over."""
    return points >= 40 * components and mode != "split"


def check(case, backend):
    """Components that share few points may have no variance, and rounding is divided by it: by epsilon, in float64."""
    points = math.prod(case.shape) // case.shape[1]
    amplification = 1 if enough(points, case.components, case.mode) else 10 / EPS
    assert_results(run(case, backend), expected(case), case, amplification=amplification)


@given(case=any_case(["channel", "joint", "split"]))
def test_native(case):
    check(case, "native")


@given(case=any_case(["channel", "joint", "split"]))
def test_reference(case):
    check(case, "reference")


@pytest.mark.parametrize("backend_name", ["native", "reference"])
@given(
    images=st.integers(0, 3),
    channels=st.integers(1, 5),
    spatial=spatial_sizes(least=0),
    components=st.integers(1, 5),
    mode=st.sampled_from(["channel", "joint", "split"]),
    training=st.booleans(),
    layout=layouts,
    dtype=dtypes,
)
def test_zero_size(backend_name, images, channels, spatial, components, mode, training, layout, dtype):
    """Without elements the output is empty, the gradients are zero and the running statistics stay as they are."""
    shape = (images, channels, *spatial) if 0 in spatial else (0, channels, *spatial)
    case = Case(shape, components, mode, training or mode == "split", dtype, layout=layout)
    y, grad_input, _, grad_weight, grad_bias, *running = run(case, backend_name)
    assert y.shape == grad_input.shape == shape and y.dtype == grad_input.dtype == dtype
    assert not grad_weight.any() and not grad_bias.any()
    if case.training:
        for now, then in zip(running, case.arguments()[4:7], strict=True):
            assert torch.equal(now, then)
