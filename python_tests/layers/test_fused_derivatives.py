"""Derivatives of the layers with activation and residual, and the layers under torch.func, torch.compile and export."""

import copy

import pytest
import torch
from torch import nn

import cbn_ext
from cbn_ext import (
    CompoundBatchNormAct1d,
    CompoundBatchNormAct2d,
    compound_batch_norm,
    split_batch_norm,
    split_path,
)
from python_tests.support import cases
from python_tests.support.cases import EPS, MOMENTUM, Case, leaves
from python_tests.support.tolerances import assert_close

paths = pytest.mark.parametrize("path", ["compound", "split", "evaluation"])
# A backend, a mode and whether in training.
passes = pytest.mark.parametrize(
    ("backend_name", "mode", "training"),
    [
        ("native", "channel", True),
        ("native", "channel", False),
        ("native", "split", True),
        ("native", "joint", True),
        ("native", "joint", False),
        ("reference", "channel", True),
        ("reference", "channel", False),
        ("reference", "joint", True),
        ("reference", "joint", False),
        ("reference", "split", True),
    ],
)

FORMS = [Case(activation="relu"), Case(activation="relu", residual=True), Case(residual=True)]
forms = pytest.mark.parametrize("form", FORMS, ids=["relu", "residual-relu", "residual"])


def function_of(case):
    """Output of (x, residual, weight, bias), the running statistics held at the case's."""
    _, _, _, groups, *running, _, _ = case.arguments()

    def function(x, residual, weight, bias):
        state = [t.clone() for t in running]
        fused = {"residual": residual, "activation": case.activation}
        if case.mode == "split":
            return split_batch_norm(x, groups, *state[1:], weight, bias, MOMENTUM, EPS, **fused)
        return compound_batch_norm(
            x, *state, weight, bias, case.training, MOMENTUM, EPS, case.mode, case.detach, **fused
        )

    return function


def case_of(form, mode, training, **options):
    return Case(
        mode=mode, training=training or mode == "split", dtype=torch.float64,
        activation=form.activation, residual=form.residual, **options,
    )  # fmt: skip


@forms
@passes
def test_gradcheck(backend_name, mode, training, form):
    case = case_of(form, mode, training, shape=(4, 2, 3), components=3, layout="channels_last")
    arguments = leaves(case.arguments())
    inputs = (arguments.x, arguments.residual, arguments.weight, arguments.bias)
    with cbn_ext.use_backend(backend_name):
        before = cases.output(case, arguments)[0]
        assert before.abs().min() > 1e-5  # farther from the kink than a finite difference
        assert torch.autograd.gradcheck(function_of(case), inputs)
        assert torch.autograd.gradgradcheck(function_of(case), inputs)


@forms
@passes
@pytest.mark.parametrize("detach", [False, True], ids=["full", "detached"])
def test_second_derivatives_are_the_oracles(backend_name, mode, training, form, detach):
    """The ReLU's gate is a constant of every derivative, also where the gate is not known from x alone."""
    case = case_of(form, mode, training, shape=(6, 3, 5), detach=detach and mode != "split")
    directions = [torch.randn(size, dtype=torch.float64) for size in ((6, 3, 5), (6, 3, 5), (4, 3), (4, 3))]

    def derivatives(function):
        arguments = leaves(case.arguments())
        inputs = [t for t in (arguments.x, arguments.residual, arguments.weight, arguments.bias) if t is not None]
        grad = arguments.grad.clone().requires_grad_()
        first = torch.autograd.grad(function(arguments), inputs, grad, create_graph=True)
        along = [d for d, t in zip(directions, (0, arguments.residual, 0, 0), strict=True) if t is not None]
        total = sum((f * d).sum() for f, d in zip(first, along, strict=True))
        return torch.autograd.grad(total, [grad, *inputs], materialize_grads=True)

    def layer(arguments):
        return function_of(case)(arguments.x, arguments.residual, arguments.weight, arguments.bias)

    def composite(arguments):
        y = cases.output(case, arguments)[0]
        return y.relu() if case.activation else y

    with cbn_ext.use_backend(backend_name):
        actual = derivatives(layer)
    for mine, wanted in zip(actual, derivatives(composite), strict=True):
        quantity = "grad_affine" if mine.ndim == 2 else "grad_input"
        if wanted.any() or mine.any():
            assert_close(mine, wanted, quantity, torch.float64, amplification=10)


@forms
@paths
def test_func_grad(backend, form, path):
    case = case_of(form, "split" if path == "split" else "channel", path == "compound")
    function = function_of(case)
    x, grad, residual, *_, weight, bias = case.arguments()
    argnums = (0, 1, 2, 3) if form.residual else (0, 2, 3)

    def loss(*inputs):
        return (function(*inputs) * grad).sum()

    by_func = torch.func.grad(loss, argnums)(x, residual, weight, bias)
    inputs = [None if t is None else t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    by_autograd = torch.autograd.grad(loss(*inputs), [t for t in inputs if t is not None])
    for mine, theirs in zip(by_func, by_autograd, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@paths
def test_vmap_over_grad(backend, residual, path):
    """Gradients for several inputs and residuals at once are those of one after the other."""
    layer = CompoundBatchNormAct1d(3, track_running_stats=path == "evaluation", dtype=torch.float64)
    layer.train(path != "evaluation")
    grad, *inputs = torch.randn(3, 2, 6, 3, 5, dtype=torch.float64)

    def loss(x, added):
        with split_path(torch.arange(6) % 4) if path == "split" else torch.enable_grad():
            return (layer(x, added if residual else None) * grad[0]).sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    together = torch.vmap(gradient)(*inputs)
    for i in range(2):
        for several, one in zip(together, gradient(inputs[0][i], inputs[1][i]), strict=True):
            torch.testing.assert_close(several[i], one)


class Block(nn.Module):
    """A residual block, as a compiler sees it."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.first = CompoundBatchNormAct2d(8, **options)
        self.second = CompoundBatchNormAct2d(8, **options)
        self.third = CompoundBatchNormAct2d(8, activation=None, **options)

    def forward(self, x):
        x = self.second(self.conv(self.first(self.conv(x))), x)
        return self.third(self.conv(x), x)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend_name", "responsibility", "training", "dynamic"),
    [
        ("native", "channel", True, False),
        ("native", "channel", True, True),
        ("native", "channel", False, True),
        ("native", "joint", True, True),
        ("reference", "channel", True, True),
        ("reference", "joint", True, False),
    ],
)
def test_compile_without_graph_breaks(fresh_compiler, backend_name, responsibility, training, dynamic):
    """Outputs, gradients and state of a residual block are those of eager mode; odd sizes, whose bits fill no byte."""
    block = Block(responsibility=responsibility).train(training)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with cbn_ext.use_backend(backend_name):
        for size, side in ((3, 5), (5, 7)) if dynamic else ((3, 5), (3, 5)):
            x = torch.randn(size, 8, side, side)
            mine, theirs = (x.clone().requires_grad_() for _ in range(2))
            y, expected = compiled(mine), eager(theirs)
            torch.testing.assert_close(y, expected)
            y.square().sum().backward(), expected.square().sum().backward()
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(block.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-3)
    for mine, theirs in zip(block.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("responsibility", ["channel", "joint"])
def test_export_of_evaluation(backend, responsibility):
    block = Block(responsibility=responsibility).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(block, (torch.randn(4, 8, 5, 5),), dynamic_shapes={"x": {0: batch}})
    for size in (2, 7):
        x = torch.randn(size, 8, 5, 5)
        torch.testing.assert_close(program.module()(x), block(x))
