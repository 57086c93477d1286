"""The pure-PyTorch fallback against the oracle, and the oracle against nn.BatchNorm2d."""

import pytest
import torch
from torch import nn

from cbn_ext import Mode, Options, reference
from python_tests.support import oracle
from python_tests.support.cases import CASES, EPS, Case, assert_results, expected, run
from python_tests.support.tolerances import assert_close

MODES = {"channel": Mode.CHANNEL, "split": Mode.GROUPS, "joint": Mode.JOINT}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case):
    assert_results(run(case, "reference"), expected(case), case)


@pytest.mark.parametrize("mode", ["channel", "joint", "split"])
@pytest.mark.parametrize("data", ["mixed", "dead"])
def test_forward_returns_the_batch_statistics(mode, data):
    case = Case(mode=mode, data=data, dtype=torch.float64)
    x, _, _, groups, prior, mean, var, weight, bias = case.arguments()
    responsibility = "joint" if mode == "joint" else "channel"
    options = Options(MODES[mode], True, False, False, EPS)
    y, _, _, (mass, batch_mean, batch_var), _ = reference.forward(
        x, None, groups, prior, mean, var, weight, bias, options
    )
    step = oracle.train_step(x, prior, mean, var, weight, bias, groups=groups, eps=EPS, responsibility=responsibility)
    assert_close(y, step.y, "output", x.dtype)
    for actual, wanted in ((mass, step.mass), (batch_mean, step.mean), (batch_var, step.var)):
        assert_close(actual, wanted, "statistics", x.dtype)
    if data == "dead":
        assert torch.equal(mass[0], torch.zeros_like(mass[0]))
        assert torch.equal(batch_mean[0], mean[0]) and torch.equal(batch_var[0], var[0])


@pytest.mark.parametrize("responsibility", ["channel", "joint"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_plain_autograd(responsibility, detach, training):
    """The closed-form backward of the functions equals autograd's through `reference.forward` itself."""
    case = Case(
        mode=responsibility,
        components=3,
        training=training,
        dtype=torch.float64,
        detach=detach,
        shape=(3, 2, 5),
    )
    x, grad, _, groups, *running, weight, bias = case.arguments()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    options = Options(MODES[responsibility], training, False, detach, EPS)
    y, *_ = reference.forward(x, None, groups, *running, weight, bias, options)
    by_autograd = torch.autograd.grad(y, leaves, grad)
    closed_form = run(case, "reference")
    assert_close(closed_form.grad_input, by_autograd[0], "grad_input", x.dtype)
    assert_close(closed_form.grad_weight, by_autograd[1], "grad_affine", x.dtype)
    assert_close(closed_form.grad_bias, by_autograd[2], "grad_affine", x.dtype)


def test_oracle_with_one_component_is_batchnorm():
    """The oracle is checked too: against scikit-learn in test_em.py, against batch normalization here."""
    x, grad, _, _, prior, mean, var, weight, bias = Case(components=1, dtype=torch.float64).arguments()
    norm = nn.BatchNorm2d(x.shape[1], dtype=torch.float64)
    norm.load_state_dict(
        {
            "weight": weight[0],
            "bias": bias[0],
            "running_mean": mean[0],
            "running_var": var[0],
            "num_batches_tracked": torch.tensor(0),
        }
    )
    x.requires_grad_()
    step = oracle.train_step(x, prior, mean, var, weight, bias)
    y = norm(x)
    assert_close(step.y, y, "output", x.dtype)
    ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (step.y, y))
    assert_close(ours, theirs, "grad_input", x.dtype)
    assert_close(step.running_mean[0], norm.running_mean, "statistics", x.dtype)
    assert_close(step.running_var[0], norm.running_var, "statistics", x.dtype)
    assert_close(oracle.evaluate(x, step.running_prior, step.running_mean, step.running_var, weight, bias),
                 norm.eval()(x), "output", x.dtype)  # fmt: skip
