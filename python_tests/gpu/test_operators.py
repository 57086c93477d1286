"""The CUDA operators themselves: opcheck, finite differences, alignment, and tensors of more than 2^31 elements."""

from dataclasses import replace

import pytest
import torch

from cbn_ext import compound_batch_norm, split_batch_norm
from python_tests.support import oracle
from python_tests.support.cases import EPS, MOMENTUM, Case, backward_arguments, forward_arguments, leaves
from python_tests.support.tolerances import assert_close

OPS = torch.ops.cbn_ext

CASES = [
    Case(),
    Case(training=False),
    Case(mode="split"),
    Case(components=3, detach=True),
    Case(components=1, affine=False, dtype=torch.float64),
    Case(dtype=torch.bfloat16, layout="channels_last"),
    Case(dtype=torch.float16, layout="sliced"),
    Case(shape=(2, 3, 3, 4, 5), layout="channels_last", grad_layout="contiguous"),
    Case(shape=(19, 3), layout="channels_last"),
    Case(layout="transposed"),
    Case(shape=(0, 3, 4, 4)),
    Case(mode="joint"),
    Case(mode="joint", training=False, layout="channels_last", dtype=torch.bfloat16),
    Case(shape=(3, 300, 3, 13), mode="joint"),
]
FUSED = {"activation": "relu", "residual": True}


@pytest.mark.parametrize("fused", [{}, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, fused):
    case = replace(case, **fused)
    torch.library.opcheck(OPS.forward.default, forward_arguments(case, "cuda"))
    torch.library.opcheck(OPS.backward.default, backward_arguments(case, "cuda"))


@pytest.mark.parametrize("mode", ["channel", "split", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_update_running(mode, dtype):
    x, _, _, prior, mean, var, *_ = arguments = forward_arguments(Case(mode=mode, dtype=dtype), "cuda")
    batch = OPS.forward(*arguments)[3]
    points = x.numel() // x.shape[1]
    torch.library.opcheck(OPS.update_running.default, (prior, mean, var, batch, points, MOMENTUM))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("mode", "training"),
    [("channel", True), ("channel", False), ("split", True), ("joint", True), ("joint", False)],
    ids=["train", "eval", "split", "joint", "joint-eval"],
)
@pytest.mark.parametrize("fused", [{}, {"activation": "relu"}, FUSED], ids=["plain", "relu", "fused"])
def test_derivatives(fused, mode, training, layout):
    """Against finite differences; the second derivative goes through the composite formula on the GPU."""
    case = Case((4, 2, 3, 1), 3, mode, training, torch.float64, layout=layout, **fused)
    x, _, residual, groups, *running, weight, bias = leaves(case.arguments("cuda"))

    def function(x, weight, bias, residual=None):
        state = [t.clone() for t in running]
        options = {"residual": residual, "activation": case.activation}
        responsibility = "joint" if mode == "joint" else "channel"
        if mode == "split":
            return split_batch_norm(x, groups, *state[1:], weight, bias, MOMENTUM, EPS, **options)
        return compound_batch_norm(x, *state, weight, bias, training, MOMENTUM, EPS, responsibility, **options)

    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def misaligned(tensor):
    """The same values one element behind an aligned address."""
    memory = tensor.new_empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride())
    return memory.copy_(tensor)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 8, 8), (3, 7, 5, 3)], ids=["even", "odd"])
def test_any_alignment_gives_the_same_bits(shape, dtype, layout, path):
    """Sums are cut by shape, not by address: nothing may depend on where a tensor begins."""

    case = Case(shape, dtype=dtype, layout=layout, **FUSED)

    def results(place):
        arguments = [place(a) if isinstance(a, torch.Tensor) else a for a in forward_arguments(case, "cuda")]
        y, mask, running, batch = OPS.forward(*arguments)
        backward = OPS.backward(*backward_arguments(case, "cuda", place))
        return y, mask, running, batch, *backward

    for expected, actual in zip(results(torch.clone), results(misaligned), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "one_channel"])
def test_more_than_two_to_the_31_elements(kind, dtype):
    """Three images are repeated and a fourth put at the end: the oracle needs these four, with their multiplicities.

    An image has an odd number of points, so that an offset that wrapped around would find other values. In
    "one_channel" all of them are the points of one channel of one image.
    """
    channels, size = (1, 943) if kind == "one_channel" else (32, 167)
    copies = 2**31 // (3 * channels * size**2) + 1
    images = torch.randn(4, channels, size, size, device="cuda")
    images = images * torch.linspace(0.5, 2, channels, device="cuda").view(-1, 1, 1) + 1
    images[3] = 3 * images[3] - 4
    images = images.to(dtype)
    times = torch.tensor([copies, copies, copies, 1.0], dtype=torch.float64, device="cuda").view(4, 1, 1, 1)
    prior, mean, var, weight, bias = (
        torch.tensor(pair, device="cuda").view(2, 1).repeat(1, channels)
        for pair in ([0.4, 0.6], [0.5, 1.5], [1.0, 2.0], [1.0, -0.5], [0.0, 1.0])
    )

    exact = images.double().requires_grad_()
    p = oracle.posterior(exact, *oracle.double(prior, mean, var), EPS)
    mass, batch_mean, batch_var = oracle.moments(exact, times * p)
    wanted = oracle.combine(exact, p, batch_mean, batch_var, *oracle.double(weight, bias), EPS)
    wanted_grad = torch.autograd.grad(wanted, exact, times * exact.detach())[0] / times

    count = 3 * copies + 1
    memory_format = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    x = torch.empty(count, channels, size, size, dtype=dtype, device="cuda", memory_format=memory_format)
    x[:-1].unflatten(0, (copies, 3))[:] = images[:3]
    x[-1] = images[3]
    assert x.numel() > 2**31
    shape = (1, 1, -1) if kind == "one_channel" else x.shape
    leaf = x.view(shape).requires_grad_()

    def assert_images_close(result, wanted, quantity):
        # Few enough that most values differ: equal ones are rounded alike, and their errors do not cancel.
        result, wanted = (t[..., ::13, ::13] for t in (result.view_as(x), wanted))
        for first, kinds in ((0, [0, 1, 2]), (3 * (copies // 2), [0, 1, 2]), (count - 3, [1, 2, 3])):
            assert_close(result[first : first + 3], wanted[kinds], quantity, dtype)

    y = compound_batch_norm(leaf, prior, mean, var, weight, bias, training=True, momentum=1.0)
    assert_close(prior, (mass / mass.sum(0)).detach(), "statistics", dtype)
    assert_close(mean, batch_mean.detach(), "statistics", dtype)
    assert_close(var, (batch_var * mass / (mass - 1)).detach(), "statistics", dtype)
    assert_images_close(y.detach(), wanted.detach(), "output")
    assert_images_close(torch.autograd.grad(y, leaf, leaf.detach())[0], wanted_grad, "grad_input")
