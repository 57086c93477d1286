"""Accuracy where it is hard: 16 bits, large means, constant channels, lost components, outliers, NaN, long sums."""

import copy
import math

import pytest
import torch
from torch import nn

from cbn_ext import CompoundBatchNorm2d, compound_batch_norm, split_batch_norm, split_path
from python_tests.support import oracle
from python_tests.support.cases import Case, expected, run
from python_tests.support.tolerances import assert_close, roundoff

EPS = 1e-5
FORMATS = [torch.contiguous_format, torch.channels_last]


def relative_error(actual, wanted):
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


def step_errors(layer, exact, x, grad):
    """Relative L2 errors of one training step's output and gradients, against `exact` in float64."""
    results = []
    for norm, dtype in ((layer, x.dtype), (exact, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        y = norm(leaf)
        y.backward(grad.to(dtype))
        results.append((y.detach(), leaf.grad, norm.weight.grad, norm.bias.grad))
    return [relative_error(mine.reshape(wanted.shape), wanted) for mine, wanted in zip(*results, strict=True)]


def batchnorm_like(x, offset=0.0, spread=1.0):
    """nn.BatchNorm2d with random affine parameters and running statistics near x's."""
    norm = nn.BatchNorm2d(x.shape[1])
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norm.running_mean += offset
    norm.running_var *= spread**2
    return norm


class Oracle(nn.Module):
    """The oracle in a layer's clothes, with a layer's state."""

    def __init__(self, layer):
        super().__init__()
        self.running = [t.clone() for t in (layer.running_prior, layer.running_mean, layer.running_var)]
        self.weight, self.bias = (nn.Parameter(t.detach().double()) for t in (layer.weight, layer.bias))

    def forward(self, x):
        return oracle.train_step(x, *self.running, self.weight, self.bias).y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("offset", [0, 10])
def test_16_bit_error_is_at_most_twice_batchnorms(backend, dtype, memory_format, offset):
    """With one component, output and every gradient, against float64 of the same rounded input."""
    x = (offset + torch.randn(32, 64, 14, 14)).to(dtype, memory_format=memory_format)
    grad = torch.randn(x.shape).to(dtype, memory_format=memory_format)
    norm = batchnorm_like(x, offset)
    ours = CompoundBatchNorm2d(64, 1)
    ours.load_state_dict(norm.state_dict())
    exact = copy.deepcopy(norm).double()
    allowed = step_errors(norm, copy.deepcopy(exact), x, grad)
    measured = step_errors(ours, exact, x, grad)
    for name, mine, theirs in zip(("output", "input", "weight", "bias"), measured, allowed, strict=True):
        assert mine <= 2 * theirs, f"{name}: {mine:.2e}, nn.BatchNorm2d {theirs:.2e}"


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("components", [1, 4])
@pytest.mark.parametrize("running", ["learnt", "fresh"])
def test_mean_of_ten_thousand_deviations(backend, memory_format, components, running):
    """Float32 data with mean/std = 1e4: as accurate as nn.BatchNorm2d, in its better memory format, on the same data.

    The derivative of the responsibilities contains the normalized values, with the output's error; so with more
    than one component the gradient of x is held to the error of batch normalization's output. While the running mean is
    still far away, the native operator's deviations from it carry the rounding of x into the gradient of the weight.
    """
    spread = 0.5 + torch.rand(64)
    x = spread.view(1, -1, 1, 1) * (1e4 + torch.randn(32, 64, 14, 14))
    grad = torch.randn(x.shape)
    norm = batchnorm_like(x, 1e4 * spread, spread) if running == "learnt" else batchnorm_like(x)
    ours = CompoundBatchNorm2d(64, components)
    ours.load_state_dict(norm.state_dict())
    allowed = step_errors(norm, copy.deepcopy(norm).double(), x, grad)
    output, by_input, by_weight, by_bias = step_errors(
        ours, Oracle(ours), x.contiguous(memory_format=memory_format), grad
    )
    assert output <= 1.1 * allowed[0]
    assert by_input <= (1.1 * allowed[1] if components == 1 else allowed[0])
    assert by_weight <= (2 if running == "learnt" else 10) * allowed[2]
    assert by_bias <= 1e-6


@pytest.mark.parametrize("components", [1, 2, 4])
@pytest.mark.parametrize("mode", ["channel", "split"])
def test_large_mean_statistics(backend, components, mode):
    """The running statistics of the same kind of data, against the oracle, within the table."""
    case = Case((16, 6, 9, 9), components, mode, data="offset")
    actual, wanted = run(case, backend), expected(case)
    for name in ("running_mean", "running_var"):
        assert_close(getattr(actual, name), getattr(wanted, name), "statistics", case.dtype)


@pytest.mark.parametrize("components", [1, 2, 4])
@pytest.mark.parametrize("position", [0, 1, -1])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_one_outlier(backend, components, position, memory_format):
    """Wherever it is: the point that sums are shifted by must not be it alone."""
    layer = random_layer(components)
    x = torch.randn(8, 3, 33, 33)
    x.view(8, 3, -1)[0 if position >= 0 else -1, :, position] = 1e3
    running = [t.clone() for t in (layer.running_prior, layer.running_mean, layer.running_var)]
    wanted = oracle.train_step(x, *running, layer.weight, layer.bias)
    y = layer(x.contiguous(memory_format=memory_format))
    assert_close(y, wanted.y, "output", x.dtype)
    assert_close(layer.running_var, wanted.running_var, "statistics", x.dtype)
    ordinary = x.abs() < 100  # the rest is not forgotten beside the large value
    assert ((y - wanted.y)[ordinary]).abs().max() <= 1e-4


def train_step(layer, x, path):
    """Output and input gradient of one training step of `layer` on x, through either path."""
    x = x.clone().requires_grad_()
    if path == "split":
        with split_path(torch.arange(len(x)) % layer.num_components):
            y = layer(x)
    else:
        y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return y.detach(), x.grad


def random_layer(components=4):
    layer = CompoundBatchNorm2d(3, components)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return layer


paths = pytest.mark.parametrize("path", ["compound", "split"])


@pytest.mark.parametrize("value", [0.0, 1.5, -1e4])
@pytest.mark.parametrize("components", [1, 4])
@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_constant_channel(backend, value, components, path, dtype):
    """Without deviation the output is the biases' mean, up to the rounding of x - mean; nothing becomes infinite."""
    layer = random_layer(components)
    start_var = layer.running_var.clone()
    clean = torch.randn(8, 3, 5, 5).to(dtype)
    constant = clean.clone()
    constant[:, 1] = value
    undisturbed = train_step(copy.deepcopy(layer), clean, path)
    y, grad = train_step(layer, constant, path)

    weight, bias = layer.weight[:, 1].detach(), layer.bias[:, 1].detach()
    # 1/std is 1/sqrt(eps).
    rounding = 4 * roundoff(torch.float32) * (1 + abs(value)) * weight.abs().max() / layer.eps**0.5
    rounding += roundoff(dtype) * bias.abs().max()
    assert bias.min() - rounding <= y[:, 1].min() and y[:, 1].max() <= bias.max() + rounding
    assert all(t.isfinite().all() for t in (grad, layer.weight.grad, layer.bias.grad, *layer.state_dict().values()))
    assert (layer.running_var >= 0).all() and (layer.running_var[:, 1] <= start_var[:, 1] * (1 + 1e-6)).all()
    for mine, theirs in zip((y, grad), undisturbed, strict=True):
        assert torch.equal(mine[:, ::2], theirs[:, ::2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@paths
def test_nan_and_inf_stay_in_their_channel(backend, bad, path):
    """With several components, too, training loses the whole channel (at least the group's part), and no other."""
    layer = random_layer()
    clean = torch.randn(8, 3, 5, 5)
    disturbed = clean.clone()
    disturbed[2, 1, 3, 4] = bad
    undisturbed = train_step(copy.deepcopy(layer), clean, path)
    y, grad = train_step(layer, disturbed, path)
    images = slice(2, None, 4) if path == "split" else slice(None)
    for mine, theirs in zip((y, grad), undisturbed, strict=True):
        assert torch.equal(mine[:, ::2], theirs[:, ::2])
        assert not mine[images, 1].isfinite().any()
    assert torch.equal(layer.running_mean.isfinite().all(0), torch.tensor([True, False, True]))
    assert torch.equal(layer.weight.grad.isfinite().all(0), torch.tensor([True, False, True]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_in_evaluation_stay_in_their_point(backend, bad):
    layer = random_layer().eval()
    x = torch.randn(8, 3, 5, 5)
    expected_y = layer(x)
    x[2, 1, 3, 4] = bad
    y = layer(x)
    assert torch.equal(y.isfinite(), x.isfinite())
    assert torch.equal(y[x.isfinite()], expected_y[x.isfinite()])


def test_component_without_mass_keeps_its_statistics(backend):
    """Bit for bit, only its prior decays; and it is not lost: near the data it takes its share again."""
    layer = CompoundBatchNorm2d(3, 4)
    layer.running_mean[1] = 1e4
    before = copy.deepcopy(layer.state_dict())
    y, grad = train_step(layer, torch.randn(8, 3, 5, 5), "compound")
    assert y.isfinite().all() and grad.isfinite().all()
    assert max(layer.weight.grad[1].abs().max(), layer.bias.grad[1].abs().max()) < 1e-30  # as its mass
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(layer, name)[1], before[name][1])
        assert (getattr(layer, name)[[0, 2, 3]] != before[name][[0, 2, 3]]).all()
    torch.testing.assert_close(layer.running_prior[1], 0.9 * before["running_prior"][1])

    layer.running_prior[1] = 0
    layer.running_mean[:] = torch.tensor([10.0, 0.0, 10.0, 10.0])[:, None]
    for _ in range(10):
        layer(torch.randn(8, 3, 5, 5))
    assert (layer.running_prior[1] > 0.5).all()


def test_all_components_far_away(backend):
    """The nearest takes the points, however far: the normalisation of the posterior must not underflow."""
    layer = CompoundBatchNorm2d(3, 4)
    x = 500 + torch.randn(8, 3, 5, 5)
    given = [t.clone() for t in (layer.running_prior, layer.running_mean, layer.running_var)]
    step = oracle.train_step(x, *given, layer.weight, layer.bias)
    # x - mean loses what a float32 mean of 500 has lost.
    torch.testing.assert_close(layer(x).double(), step.y, rtol=0, atol=4 * 500 * roundoff(x.dtype))
    assert_close(layer.running_mean, step.running_mean, "statistics", x.dtype)
    assert_close(layer.running_prior, step.running_prior, "statistics", x.dtype)


@pytest.mark.parametrize("equal_variances", [True, False])
@pytest.mark.parametrize("components", [1, 2, 4, 5, 8])
def test_outliers(backend, equal_variances, components):
    """Points up to a million deviations out have a posterior and a derivative; squares of x must not cancel there."""
    layer = CompoundBatchNorm2d(3, components)
    if not equal_variances:
        layer.running_var.uniform_(0.3, 3)
    magnitudes = torch.tensor([0, 1, 3, 10, 30, 1e2, 1e3, 1e4, 1e5, 1e6])
    x = torch.cat([magnitudes, -magnitudes]).view(-1, 1, 1, 1).repeat(1, 3, 1, 1).requires_grad_()
    y = layer.eval()(x)
    grad = torch.autograd.grad(y.sum(), x)[0]
    x64 = x.detach().double().requires_grad_()
    state = (layer.running_prior, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    y64 = oracle.evaluate(x64, *state)
    grad64 = torch.autograd.grad(y64.sum(), x64)[0]
    # Each point by itself: no other is of its size.
    torch.testing.assert_close(y.double(), y64, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(grad.double(), grad64, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["channel", "split"])
def test_long_sums(backend, mode):
    """A million points per channel: partial sums are merged, not added up one by one in float32."""
    case = Case((4, 2, 512, 513), 2, mode, data="mixed")
    x, grad, _, groups, *running, weight, bias = case.arguments()
    wanted = [t.clone() for t in running]
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    if mode == "split":
        y = split_batch_norm(x, groups, *running[1:], weight, bias)
    else:
        y = compound_batch_norm(x, *running, weight, bias, training=True)
    step = oracle.train_step(exact[0], *wanted, *exact[1:], groups=groups)
    assert_close(y, step.y, "output", x.dtype)
    for mine, theirs in zip(running, (step.running_prior, step.running_mean, step.running_var), strict=True):
        assert_close(mine, theirs, "statistics", x.dtype)
    by_x, *by_affine = torch.autograd.grad(y, leaves, grad)
    exact_by_x, *exact_by_affine = torch.autograd.grad(step.y, exact, grad.double())
    assert_close(by_x, exact_by_x, "grad_input", x.dtype)
    # These sums cancel; the error that adding up one by one makes is hundreds of roundoffs of what is added up.
    added = grad.double().abs().sum((0, 2, 3))
    for mine, theirs in zip(by_affine, exact_by_affine, strict=True):
        assert ((mine - theirs).abs() <= 10 * roundoff(x.dtype) * added).all()


# Mixtures of which every formula must keep its digits: standard deviations of the means, and of the variances'
# logarithms; or the distance of all from each other. Beside them the errors that float32 may have, in units of a
# channel's largest value: the median over the channels, and the largest.
MIXTURES = {
    "ordinary": ((1, 1), 1e-6, 1e-5),
    "narrow and wide": ((3, 4), 5e-6, 2e-4),
    "far": ((8, 2), 5e-6, 1e-4),
    "nearly equal": ((1e-3, 1e-3), 5e-7, 2e-6),
    "equal but for rounding": ((1e-7, 1e-7), 1e-6, 5e-6),
}


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_gradients_of_hard_mixtures(backend, memory_format, mixture, detach):
    (of_means, of_variances), median, largest = MIXTURES[mixture]
    components, channels = 4, 64
    mean, log_var = torch.randn(2, components, channels)
    running = torch.softmax(torch.randn(components, channels), 0), of_means * mean, (of_variances * log_var).exp()
    x, grad = drawn_from(*running, shape=(8, channels, 8, 8))
    assert_gradients(x.contiguous(memory_format=memory_format), grad, running, detach, median, largest)


@pytest.mark.parametrize("reach", [30, 30.2, 1000, 1e5])
def test_gradients_of_odds_centred_far_from_the_data(backend, reach):
    """Two variances as good as equal: the parabola of the odds is wide, its centre so many deviations away.

    Of 512 points the expanded form is left at 30.08 of them.
    """
    var = torch.tensor([[1.0], [1 - 2e-6]]).expand(2, 16)
    excess = 1 / (var[1] + EPS) - 1 / (var[0] + EPS)
    distance = reach * (1 + EPS) ** 0.5 * excess * (var[1] + EPS)
    running = torch.full((2, 16), 0.5), torch.stack([torch.zeros(16), distance]).float(), var
    x, grad = drawn_from(*running, shape=(8, 16, 8, 8))
    assert_gradients(x, grad, running, False, 1e-6, 5e-6)


@pytest.mark.parametrize("height", [59.5, 60.5])
def test_gradients_of_odds_as_large_as_they_may_be(backend, height):
    """Above 2^60 they are no longer exponentiated as they are."""
    var = torch.tensor([1.0, 0.25]).to(torch.float64) + EPS
    precision = math.log2(math.e) / (2 * var)
    factor = precision[0] * precision[1] / (precision[1] - precision[0])
    distance = ((height - 0.5 * math.log2(var[0] / var[1])) / factor) ** 0.5
    running = (
        torch.full((2, 16), 0.5),
        torch.tensor([0, distance]).float().view(2, 1).expand(2, 16),
        (var - EPS).float().view(2, 1).expand(2, 16),
    )
    x, grad = drawn_from(*running, shape=(8, 16, 8, 8))
    assert_gradients(x, grad, running, False, 5e-6, 2e-5)


def drawn_from(prior, mean, var, shape):
    """Points of the mixtures (M, C) and a gradient, of a shape (N, C, H, W)."""
    n, channels, *size = shape
    component = torch.multinomial(prior.T, n * math.prod(size), replacement=True).T  # (P, C)
    x = mean.gather(0, component) + var.gather(0, component).sqrt() * torch.randn(component.shape)
    return x.view(n, *size, channels).movedim(-1, 1).contiguous(), torch.randn(shape)


def assert_gradients(x, grad, running, detach, median, largest):
    """In evaluation, where nothing but the formula has an error, with random affine pairs."""
    weight, bias = 1 + 0.5 * torch.randn(running[0].shape), torch.randn(running[0].shape)

    def gradient(dtype, function):
        arguments = (t.to(dtype) for t in (x, *running, weight, bias))
        leaf, *others = arguments
        leaf.requires_grad_()
        return torch.autograd.grad(function(leaf, *others), leaf, grad.to(dtype))[0]

    options = {"eps": EPS, "detach_responsibility": detach}
    actual = gradient(torch.float32, lambda *a: compound_batch_norm(*a, **options))
    wanted = gradient(torch.float64, lambda *a: oracle.evaluate(*a, **options))
    errors = (actual - wanted).abs().amax((0, 2, 3)) / wanted.abs().amax((0, 2, 3))
    assert errors.median() <= median and errors.max() <= largest, (errors.median(), errors.max())
