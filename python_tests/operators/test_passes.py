"""The four passes by themselves and the merge of moments: results of the fused operators, also for a batch in parts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from python_tests.support.cases import (
    EPS,
    MOMENTUM,
    Case,
    Results,
    assert_results,
    backward_arguments,
    expected,
    forward_arguments,
)
from python_tests.support.tolerances import assert_close

OPS = torch.ops.cbn_ext

# Parts of a batch of 8 images: unequal, one empty, one too small for every group.
SIZES = (1, 0, 4, 3)
FUSED = ({}, {"activation": "relu"}, {"activation": "relu", "residual": True})


def moments_arguments(case: Case) -> tuple:
    x, _, groups, prior, mean, var, _, _, mode, _, _, eps = forward_arguments(case)
    return x, groups, prior, mean, var, mode, eps


def normalise_arguments(case: Case) -> tuple:
    x, residual, groups, prior, mean, var, weight, bias, mode, _, relu, eps = forward_arguments(case)
    batch, posterior = OPS.moments(*moments_arguments(case))
    return x, residual, groups, prior, mean, var, posterior, batch, weight, bias, mode, relu, eps


def gradient_sums_arguments(case: Case) -> tuple:
    *tensors, mode, _, relu, _, eps = backward_arguments(case)
    return *tensors, mode, relu, eps


def input_gradient_arguments(case: Case) -> tuple:
    *tensors, mode, _, relu, detach, eps = backward_arguments(case)
    return *tensors, *OPS.gradient_sums(*tensors, mode, relu, eps), mode, relu, detach, eps


def merge_moments_arguments(case: Case) -> tuple[Tensor]:
    return (torch.stack([OPS.moments(*moments_arguments(case))[0]] * 2),)


ARGUMENTS = {
    "moments": moments_arguments,
    "normalise": normalise_arguments,
    "gradient_sums": gradient_sums_arguments,
    "input_gradient": input_gradient_arguments,
    "merge_moments": merge_moments_arguments,
}

CASES = [
    Case((8, 6, 5, 7), components, mode, dtype=dtype, layout=layout, **fused)
    for mode in ("channel", "split", "joint")
    for components in (1, 4)
    for layout in ("contiguous", "channels_last")
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    for fused in FUSED
]
# Component 0 is in no part.
CASES += [replace(case, data="dead") for case in CASES if case.components == 4]
CASES += [Case((8, 6, 5, 7), detach=True), Case((8, 6)), Case((8, 6), 2, "split")]
CASES += [Case((8, 6, 5, 7), mode="joint", detach=True), Case((8, 6), 2, "joint")]


@pytest.mark.parametrize(
    "case",
    [*CASES, Case((16, 8, 56, 56)), Case((16, 8, 56, 56), mode="split"), Case((16, 8, 56, 56), mode="joint")],
    ids=str,
)
def test_equal_the_fused_operators(case):
    y, mask, running, batch, posterior = OPS.forward(*forward_arguments(case))
    grads = OPS.backward(*backward_arguments(case))
    one, weights = OPS.moments(*moments_arguments(case))
    by_passes = (*OPS.normalise(*normalise_arguments(case)), one, weights)
    for actual, wanted in zip(by_passes, (y, mask, running, batch, posterior), strict=True):
        assert torch.equal(actual, wanted)
    by_passes = (
        *OPS.input_gradient(*input_gradient_arguments(case)),
        *OPS.gradient_sums(*gradient_sums_arguments(case)),
    )
    for actual, wanted in zip(by_passes, grads, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(OPS.merge_moments(one[None]), one)


def in_parts(case: Case) -> tuple[Results, Tensor]:
    """Results of a training step on a batch in parts, which share nothing but what is merged; and the statistics."""
    x, residual, groups, prior, mean, var, weight, bias, mode, _, relu, _ = forward_arguments(case)
    pieces = [
        (None,) * len(SIZES) if t is None else t.split(SIZES) for t in (x, residual, groups, case.arguments().grad)
    ]
    parts = list(zip(*pieces, strict=True))
    state = (prior, mean, var)

    moments = [OPS.moments(x, groups, *state, mode, EPS) for x, _, groups, _ in parts]
    batch = OPS.merge_moments(torch.stack([of_part for of_part, _ in moments]))
    outputs = [
        OPS.normalise(x, r, groups, *state, posterior, batch, weight, bias, mode, relu, EPS)
        for (x, r, groups, _), (_, posterior) in zip(parts, moments, strict=True)
    ]
    backward = [
        (grad, x, mask if relu and r is not None else None, groups, posterior, running, batch, weight, bias)
        for (x, r, groups, grad), (_, posterior), (_, mask, running) in zip(parts, moments, outputs, strict=True)
    ]
    sums = [OPS.gradient_sums(*tensors, mode, relu, EPS) for tensors in backward]
    grad_weight, grad_bias = (sum(of_parts) for of_parts in zip(*sums, strict=True))
    grads = [OPS.input_gradient(*t, grad_weight, grad_bias, mode, relu, case.detach, EPS) for t in backward]

    running = [None if t is None else t.clone() for t in state]
    OPS.update_running(*running, batch, x.numel() // x.shape[1], MOMENTUM)
    y = torch.cat([y for y, _, _ in outputs])
    grad_x, grad_residual = (torch.cat(of_parts) for of_parts in zip(*grads, strict=True))
    grad_residual = None if residual is None else grad_residual
    return Results(y, grad_x, grad_residual, grad_weight, grad_bias, *running), batch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_make_the_whole(case):
    results, (mass, mean, var) = in_parts(case)
    wanted = expected(case)
    if case.mode == "split":
        wanted = wanted._replace(running_prior=None)
    assert_results(results, wanted, case)
    whole, _ = OPS.moments(*moments_arguments(case))
    assert_close(mass, whole[0].double(), "statistics", case.dtype)
    if case.data == "dead":
        _, _, _, _, kept_mean, kept_var, *_ = forward_arguments(case)
        assert (mass[0] < 1e-30).all() and torch.equal(mean[0], kept_mean[0]) and torch.equal(var[0], kept_var[0])


def test_parts_lack_components():
    """What the split cases are to show: groups without an image in some parts, and one without any."""
    groups = next(case for case in CASES if case.mode == "split" and case.data == "dead").arguments().groups
    present = [set(part.tolist()) for part in groups.split(SIZES)]
    assert set.union(*present) == {1, 2, 3} and any(0 < len(p) < 3 for p in present) and set() in present


@pytest.mark.parametrize("mode", ["channel", "split", "joint"])
def test_moments_of_nothing(mode):
    """No mass, and the running mean and variance."""
    _, mean, var = arguments = forward_arguments(Case(mode=mode))[3:6]
    x = torch.empty(0, 5, 6, 7)
    groups = None if mode != "split" else torch.empty(0, dtype=torch.int64)
    batch, posterior = OPS.moments(x, groups, *arguments, {"channel": 0, "split": 1, "joint": 2}[mode], EPS)
    assert posterior.numel() == 0
    assert torch.equal(batch, torch.stack([torch.zeros_like(mean), mean, var]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merge(dtype):
    """Means at 1e4 deviations, a part without mass whose mean is far away, a component without mass in any part."""
    parts = torch.rand(5, 3, 4, 6, dtype=torch.float64) + 0.5
    parts[:, 0] *= torch.tensor([1, 1000, 10, 1, 100]).view(5, 1, 1)
    parts[:, 1] += 1e4
    parts[3, 0], parts[3, 1], parts[3, 2] = 0, -1e4, 100
    parts[:, 0, 2] = 0
    parts[:, 1:, 2] = parts[0, 1:, 2]
    parts = parts.to(dtype)

    mass, mean, var = parts.double().unbind(1)
    total = mass.sum(0)
    wanted_mean = (mass * mean).sum(0) / total
    wanted_var = (mass * (var + (mean - wanted_mean).square())).sum(0) / total
    wanted = torch.stack([total, wanted_mean, wanted_var])
    wanted[1:, 2] = parts[0, 1:, 2].double()

    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [3, 0, 4, 2, 1]):
        merged = OPS.merge_moments(parts[order])
        assert merged.dtype == dtype
        # The deviations' own rounding, 1e4 times the unit, is squared away: it is relative to them.
        tolerance = {torch.float32: 1e-7, torch.float64: 1e-11}[dtype]
        torch.testing.assert_close(merged.double(), wanted, rtol=tolerance, atol=0)
        assert torch.equal(merged[1:, 2], parts[0, 1:, 2])


def test_merge_takes_any_memory():
    parts = torch.rand(3, 3, 4, 5)
    assert torch.equal(OPS.merge_moments(parts.mT.contiguous().mT), OPS.merge_moments(parts))


@pytest.mark.parametrize("operator", ARGUMENTS)
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(components=1, mode="split"),
        Case(dtype=torch.bfloat16, layout="channels_last", mode="split", activation="relu", residual=True),
        Case(activation="relu", detach=True),
        Case(shape=(0, 3, 4, 4)),
        Case(mode="joint"),
        Case(mode="joint", components=1),
    ],
    ids=str,
)
def test_opcheck(operator, case):
    torch.library.opcheck(getattr(OPS, operator).default, ARGUMENTS[operator](case))


CHANNEL, SPLIT, JOINT = Case(), Case(mode="split"), Case(mode="joint")


@pytest.mark.parametrize(
    ("operator", "case", "position", "wrong", "message"),
    [
        ("moments", CHANNEL, 0, torch.ones(4, 5, 6, 7, dtype=torch.int32), "float32.*[Ii]nt"),
        ("moments", CHANNEL, 2, None, "prior"),
        ("moments", CHANNEL, 4, torch.ones(4, 6), r"var.*\(4, 5\).*\(4, 6\)"),
        ("moments", CHANNEL, 5, 1, "groups in mode 1.*none"),
        ("moments", CHANNEL, 5, 3, "mode 0.*1.*2.*got 3"),
        ("moments", SPLIT, 1, torch.tensor([0, 1, 4, 0]), "groups from 0 to 3, got 4 for image 2"),
        ("normalise", CHANNEL, 1, torch.ones(4, 5, 6, 1), r"residual.*\(4, 5, 6, 7\).*\(4, 5, 6, 1\)"),
        ("normalise", CHANNEL, 7, torch.ones(3, 4, 6), r"batch.*\(3, 4, 5\).*\(3, 4, 6\)"),
        ("normalise", CHANNEL, 7, torch.ones(0), r"batch.*\(3, 4, 5\).*\(0\)"),
        ("normalise", SPLIT, 2, torch.tensor([0, -1, 3, 0]), "groups from 0 to 3, got -1 for image 1"),
        ("normalise", JOINT, 6, torch.ones(0), r"posterior.*\(4, 4, 42\).*\(0\)"),
        ("input_gradient", JOINT, 4, torch.ones(4, 4, 41), r"posterior.*\(4, 4, 42\).*\(4, 4, 41\)"),
        ("gradient_sums", CHANNEL, 0, torch.ones(4, 5, 6, 8), r"grad.*\(4, 5, 6, 7\).*\(4, 5, 6, 8\)"),
        ("gradient_sums", CHANNEL, 2, torch.zeros(108, dtype=torch.uint8), "no mask without relu"),
        ("gradient_sums", CHANNEL, 6, torch.ones(3, 4, 5, dtype=torch.float64), "batch.*[Ff]loat.*[Dd]ouble"),
        ("input_gradient", CHANNEL, 9, torch.ones(3, 5), r"grad_weight.*\(4, 5\).*\(3, 5\)"),
        ("input_gradient", CHANNEL, 10, torch.ones(4, 5, dtype=torch.float64), "grad_bias.*[Ff]loat.*[Dd]ouble"),
        ("input_gradient", SPLIT, 3, torch.tensor([4, 0, 0, 0]), "groups from 0 to 3, got 4 for image 0"),
        ("merge_moments", CHANNEL, 0, torch.ones(3, 4, 5), r"\(R, 3, M, C\).*\(3, 4, 5\)"),
        ("merge_moments", CHANNEL, 0, torch.ones(0, 3, 4, 5), r"R at least 1.*\(0, 3, 4, 5\)"),
        ("merge_moments", CHANNEL, 0, torch.ones(2, 2, 4, 5), r"\(R, 3, M, C\).*\(2, 2, 4, 5\)"),
        ("merge_moments", CHANNEL, 0, torch.ones(2, 3, 4, 5, dtype=torch.float16), "float32 or float64.*[Hh]alf"),
    ],
)
def test_refuses_what_does_not_fit(operator, case, position, wrong, message):
    arguments = list(ARGUMENTS[operator](case))
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        getattr(OPS, operator)(*arguments)
