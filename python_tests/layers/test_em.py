"""One training step is one step of expectation maximisation: scikit-learn's, and it never lowers the likelihood."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from cbn_ext import CompoundBatchNorm2d, use_backend
from python_tests.support import oracle
from python_tests.support.cases import Case

EPS = 1e-3  # large enough that an epsilon in the wrong place shows
MODES = [(backend, mode) for backend in ("native", "reference") for mode in ("channel", "joint")]


def sklearn_step(points, prior, mean, var):
    """One EM step on points (P, D) from prior (M,), mean and var (M, D): prior, mean and biased variance.

    Our E-step adds epsilon to the running variances, our M-step adds none to the batch's: so epsilon goes into the
    precisions to start from and `reg_covar` is 0.
    """
    mixture = GaussianMixture(
        len(prior), covariance_type="diag", max_iter=1, reg_covar=0.0, init_params="random", random_state=0,
        weights_init=prior / prior.sum(), means_init=mean, precisions_init=1 / (var + EPS),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(points)
    return mixture.weights_, mixture.means_, mixture.covariances_


def sklearn_statistics(x, prior, mean, var, responsibility):
    """The same for x (N, C, H, W): one C-dimensional mixture, or C one-dimensional ones. Prior like `prior`."""
    points = x.movedim(1, -1).flatten(0, -2).numpy()
    prior, mean, var = (t.numpy() for t in (prior, mean, var))
    if responsibility == "joint":
        steps = sklearn_step(points, prior, mean, var)
    else:
        channels = [
            sklearn_step(points[:, [c]], prior[:, c], mean[:, [c]], var[:, [c]]) for c in range(points.shape[1])
        ]
        steps = (
            np.stack([c[0] for c in channels], 1),
            *(np.concatenate([c[i] for c in channels], 1) for i in (1, 2)),
        )
    return tuple(torch.from_numpy(s) for s in steps)


def layer_from(case, momentum, eps, **options):
    """A float64 layer with the case's running statistics, and the case's input."""
    x, _, _, _, prior, mean, var, _, _ = case.arguments()
    layer = CompoundBatchNorm2d(
        x.shape[1], case.components, eps, momentum, responsibility=case.mode, dtype=torch.float64, **options
    )
    for buffer, value in zip(
        (layer.running_prior, layer.running_mean, layer.running_var), (prior, mean, var), strict=True
    ):
        buffer.copy_(value)
    return layer, x


@pytest.mark.parametrize(("backend_name", "responsibility"), MODES)
@pytest.mark.parametrize("components", [1, 2, 3, 4, 8])
def test_one_step_is_scikit_learns(backend_name, responsibility, components):
    case = Case((8, 3, 9, 7), components, responsibility, dtype=torch.float64)
    layer, x = layer_from(case, momentum=1.0, eps=EPS)
    start = [t.clone() for t in (layer.running_prior, layer.running_mean, layer.running_var)]
    with use_backend(backend_name):
        layer(x)

    prior, mean, var = sklearn_statistics(x, *start, responsibility)
    torch.testing.assert_close(layer.running_prior, prior, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-11, atol=1e-12)
    # scikit-learn forms E[x^2] - E[x]^2, which costs it a few digits.
    mass = prior.reshape(components, -1) * (x.numel() // x.shape[1])
    biased = layer.running_var / (mass / (mass - 1).clamp(min=1))
    torch.testing.assert_close(biased, var, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("responsibility", ["channel", "joint"])
def test_oracle_step_is_scikit_learns(responsibility):
    x, _, _, _, prior, mean, var, _, _ = Case((8, 3, 9, 7), 4, responsibility, dtype=torch.float64).arguments()
    step = oracle.train_step(x, prior, mean, var, None, None, momentum=1.0, eps=EPS, responsibility=responsibility)
    wanted = sklearn_statistics(x, prior, mean, var, responsibility)
    for actual, expected in zip((step.running_prior, step.mean, step.var), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("backend_name", "responsibility"), MODES)
@pytest.mark.parametrize("components", [2, 4, 8])
def test_ten_steps_never_lower_the_likelihood(backend_name, responsibility, components):
    """With momentum 1 on fixed data, up to what the layer's variances deviate from the M-step's.

    EM gains at least Q(new) - Q(old), and its Q is largest at the M-step's variance v. The layer goes on with
    w = v n/(n-1) + eps, which lowers Q by n/2 (log(w/v) + v/w - 1) per component and channel and by nothing else: so
    much, and no more, may the likelihood fall.
    """
    eps = 1e-5
    case = Case((16, 3, 8, 8), components, responsibility, dtype=torch.float64)
    layer, x = layer_from(case, momentum=1.0, eps=eps)
    points = x.numel() // x.shape[1]

    def likelihood():
        return oracle.log_likelihood(x, layer.running_prior, layer.running_mean, layer.running_var, eps, responsibility)

    likelihoods = [likelihood()]
    for _ in range(10):
        with use_backend(backend_name):
            layer(x)
        likelihoods.append(likelihood())
        mass = layer.running_prior.reshape(components, -1) * points
        m_step_var = layer.running_var * (mass - 1) / mass
        ratio = (layer.running_var + eps) / m_step_var
        allowance = (mass / 2 * (ratio.log() + 1 / ratio - 1)).expand_as(ratio).sum().item()
        assert allowance < 1e-2 * (likelihoods[1] - likelihoods[0])
        assert likelihoods[-1] >= likelihoods[-2] - allowance - 1e-9 * abs(likelihoods[-2])
    assert likelihoods[-1] > likelihoods[1]
