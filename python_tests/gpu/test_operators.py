"""The CUDA operators themselves: opcheck, finite differences, alignment, and tensors of more than 2^31 elements."""

import oracle
import pytest
import torch
from cases import EPS, MOMENTUM, Case, with_layout
from tolerances import assert_close

from cbn_ext import compound_batch_norm, split_batch_norm

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
]
FUSIONS = {"plain": (False, False), "relu": (True, False), "residual": (False, True), "relu_residual": (True, True)}


def cuda(tensor):
    return None if tensor is None else tensor.cuda()


def forward_arguments(case, relu, residual):
    a = case.arguments()
    prior = None if case.mode == "split" else a.prior
    added = with_layout(torch.randn_like(a.x), case.layout) if residual else None
    tensors = (a.x, added, a.groups, prior, a.mean, a.var, a.weight, a.bias)
    return *map(cuda, tensors), case.training, relu, EPS


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, fusion):
    arguments = forward_arguments(case, *FUSIONS[fusion])
    torch.library.opcheck(OPS.forward.default, arguments)
    x, residual, groups, _, _, _, weight, bias, training, relu, eps = arguments
    _, mask, running, batch = OPS.forward(*arguments)
    mask = mask if relu and residual is not None else None
    grad = cuda(case.arguments().grad)
    options = (training, relu, case.detach, eps)
    torch.library.opcheck(OPS.backward.default, (grad, x, mask, groups, running, batch, weight, bias, *options))


@pytest.mark.parametrize("mode", ["channel", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_update_running(mode, dtype):
    x, _, _, prior, mean, var, *_ = arguments = forward_arguments(Case(mode=mode, dtype=dtype), False, False)
    batch = OPS.forward(*arguments)[3]
    points = x.numel() // x.shape[1]
    torch.library.opcheck(OPS.update_running.default, (prior, mean, var, batch, points, MOMENTUM))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("mode", "training"), [("channel", True), ("channel", False), ("split", True)], ids=["train", "eval", "split"]
)
def test_first_and_second_derivative(mode, training, layout, fusion):
    """Against finite differences; the second one goes through the composite formula on the GPU."""
    case = Case((4, 2, 3, 1), 3, mode, training, torch.float64, layout=layout)
    a = case.arguments()
    relu, residual = FUSIONS[fusion]
    running = [cuda(t) for t in (a.prior, a.mean, a.var)]
    groups, activation = cuda(a.groups), "relu" if relu else None

    def function(x, weight, bias, added=None):
        state = [t.clone() for t in running]
        if mode == "split":
            return split_batch_norm(x, groups, *state[1:], weight, bias, MOMENTUM, EPS, added, activation)
        return compound_batch_norm(
            x, *state, weight, bias, training, MOMENTUM, EPS, residual=added, activation=activation
        )

    added = with_layout(torch.randn_like(a.x), layout) if residual else None
    inputs = [cuda(t).requires_grad_() for t in (a.x, a.weight, a.bias, added) if t is not None]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def misaligned(tensor):
    """The same values one element behind an aligned address."""
    memory = tensor.new_empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride())
    return memory.copy_(tensor)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 8, 8), (3, 7, 5, 3)], ids=["even", "odd"])
def test_any_alignment_gives_the_same_bits(shape, dtype, layout, path):
    """Sums are cut by shape, not by address: nothing may depend on where a tensor begins."""

    def results(place):
        case = Case(shape, dtype=dtype, layout=layout)
        x, residual, groups, *others = forward_arguments(case, True, True)
        arguments = (place(x), place(residual), groups, *map(place, others[:5]), *others[5:])
        y, mask, running, batch = OPS.forward(*arguments)
        weight, bias, training, relu, eps = arguments[6:]
        grad = place(cuda(case.arguments().grad))
        options = (training, relu, case.detach, eps)
        return (
            y,
            running,
            batch,
            *OPS.backward(grad, arguments[0], mask, groups, running, batch, weight, bias, *options),
        )

    torch.manual_seed(0)
    aligned = results(torch.clone)
    torch.manual_seed(0)
    for expected, actual in zip(aligned, results(misaligned), strict=True):
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
        result = result.view_as(x)
        for first, kinds in ((0, [0, 1, 2]), (3 * (copies // 2), [0, 1, 2]), (count - 3, [1, 2, 3])):
            assert_close(result[first : first + 3], wanted[kinds], quantity, dtype)

    y = compound_batch_norm(leaf, prior, mean, var, weight, bias, training=True, momentum=1.0)
    assert_close(prior, (mass / mass.sum(0)).detach(), "statistics", dtype)
    assert_close(mean, batch_mean.detach(), "statistics", dtype)
    assert_close(var, (batch_var * mass / (mass - 1)).detach(), "statistics", dtype)
    assert_images_close(y.detach(), wanted.detach(), "output")
    assert_images_close(torch.autograd.grad(y, leaf, leaf.detach())[0], wanted_grad, "grad_input")
