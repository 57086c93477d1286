"""Joint mode: many EM steps, saturated posteriors, many channels, and what a permutation must not change."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbn_ext import CompoundBatchNorm2d, CompoundBatchNormAct2d, use_backend
from python_tests.layers.test_em import EPS, sklearn_statistics
from python_tests.support import oracle
from python_tests.support.cases import Case, assert_results, expected, results_of, run


@pytest.mark.parametrize("channels", [8, 64])
def test_twenty_steps_are_scikit_learns(backend, channels):
    """Each from the layer's own state before it; 500 points of four overlapping clusters."""
    centres = torch.randn(4, channels, dtype=torch.float64) * 3 / math.sqrt(channels)
    points = centres[torch.randint(4, (500,))] + torch.randn(500, channels, dtype=torch.float64)
    x = points[:, :, None, None]
    layer = CompoundBatchNorm2d(channels, eps=EPS, momentum=1.0, responsibility="joint", dtype=torch.float64)
    for _ in range(20):
        start = [t.clone() for t in (layer.running_prior, layer.running_mean, layer.running_var)]
        layer(x)
        prior, mean, var = sklearn_statistics(x, *start, "joint")
        torch.testing.assert_close(layer.running_prior, prior, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-10, atol=1e-12)
        mass = 500 * layer.running_prior[:, None]
        torch.testing.assert_close(layer.running_var * (mass - 1) / mass, var, rtol=1e-9, atol=1e-12)
    assert layer.running_prior.min() > 0.05  # no component was lost on the way


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_saturated(backend, layout, dtype, training):
    """Components 20 deviations and more apart in each of 64 channels: densities below every dtype's smallest number."""
    case = Case((6, 64, 5, 7), mode="joint", training=training, dtype=dtype, layout=layout, data="apart")
    _, _, _, _, prior, mean, var, _, _ = arguments = case.arguments()
    p = oracle.posterior(*oracle.double(arguments.x, prior, mean, var), 1e-5, "joint")
    assert ((p < 1e-300) | (p > 1 - 1e-15)).double().mean() > 0.95
    assert_results(run(case, backend), expected(case), case)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_error_of_the_odds_does_not_grow_with_the_channels(layout, offset):
    """Of two components near each other, beside a narrow and a far one: float32 against float64 of the same values.

    With C channels the two are 1 / sqrt(C) deviations apart in each, so that their odds stay of order one.
    """
    worst = {}
    for channels in (8, 128, 2048):
        x = (offset + torch.randn(2, channels, 12, 12)).to(memory_format=layout)
        mean = (offset + torch.randn(4, channels, dtype=torch.float64) / channels**0.5).float()
        var = 1 + torch.rand(4, channels) / channels**0.5
        mean[2], var[2] = offset + torch.randn(channels), 1e-4
        mean[3] = offset + 100
        prior = torch.tensor([0.5, 0.3, 0.1, 0.1])
        _, p = torch.ops.cbn_ext.moments(x, None, prior, mean, var, 2, 1e-5)
        exact = oracle.posterior(*oracle.double(x, prior, mean, var), 1e-5, "joint")[:, :, 0].flatten(2)
        odds, exact_odds = ((q[1] / q[0]).double().log() for q in (p, exact))
        assert 0.3 < exact_odds.std() < 5
        worst[channels] = (odds - exact_odds).abs().max().item()
    assert worst[2048] <= 4 * worst[8] and worst[2048] <= 1e-5, worst


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_with_its_points(backend, layout, value):
    """In evaluation; also where it is the median of a channel."""
    layer = CompoundBatchNorm2d(6, responsibility="joint").eval()
    x = torch.randn(3, 6, 5, 5)
    wanted = layer(x)
    x[:2, 4] = value
    y = layer(x.contiguous(memory_format=layout))
    torch.testing.assert_close(y[2], wanted[2])
    assert not torch.isfinite(y[:2, 4]).any()


def test_permutations_change_nothing(backend):
    """Of the channels and of the components: the same outputs, gradients and statistics, permuted."""
    case = Case((6, 9, 5, 7), mode="joint", dtype=torch.float64, activation="relu", residual=True)
    arguments = case.arguments()
    channels, components = torch.randperm(9), torch.randperm(4)

    def permuted(name, t):
        if name in ("x", "grad", "residual", "y", "grad_input", "grad_residual"):
            return t[:, channels]
        return t[components][:, channels] if t.dim() == 2 else t[components]

    def apply(record):
        return type(record)(*(t if t is None else permuted(name, t.detach()) for name, t in record._asdict().items()))

    def results(of):
        leaves = {name: getattr(of, name).clone().requires_grad_() for name in ("x", "residual", "weight", "bias")}
        state = {name: getattr(of, name).clone() for name in ("prior", "mean", "var")}
        return results_of(case, of._replace(**leaves, **state))

    wanted = apply(results(arguments))
    for name, one, other in zip(wanted._fields, results(apply(arguments)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_native_training_is_the_references():
    """Three steps of a small network in float64: losses and parameters; rounding grows a hundredfold with each step."""
    x, labels = torch.randn(3, 16, 3, 8, 8, dtype=torch.float64), torch.randint(0, 5, (3, 16))
    results = []
    for name in ("native", "reference"):
        torch.manual_seed(1)
        net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, bias=False), CompoundBatchNormAct2d(16, responsibility="joint")),
            *(nn.Conv2d(16, 32, 3, bias=False), CompoundBatchNormAct2d(32, responsibility="joint")),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)),
        ).double()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        losses = []
        with use_backend(name):
            for images, classes in zip(x, labels, strict=True):
                loss = F.cross_entropy(net(images), classes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        results.append([torch.stack(losses), *net.state_dict().values()])
    for native, reference in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-8, atol=1e-8)
