"""The layers under torch.func, torch.compile and torch.export."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from cbn_ext import (
    CompoundBatchNorm1d,
    CompoundBatchNorm2d,
    compound_batch_norm,
    split_batch_norm,
    split_path,
)
from python_tests.support.cases import Case
from python_tests.support.tolerances import assert_close

paths = pytest.mark.parametrize("path", ["compound", "split", "evaluation"])


def function_of(case):
    """Output of (x, weight, bias) in training or evaluation, the running statistics untouched outside."""
    _, _, _, groups, *running, _, _ = case.arguments()

    def function(x, weight, bias):
        state = [t.clone() for t in running]
        if case.mode == "split":
            return split_batch_norm(x, groups, *state[1:], weight, bias)
        return compound_batch_norm(x, *state, weight, bias, case.training)

    return function


def case_of(path, **options):
    return Case(mode="split" if path == "split" else "channel", training=path != "evaluation", **options)


@paths
def test_func_grad(backend, path):
    case = case_of(path, dtype=torch.float64)
    function = function_of(case)
    x, grad, *_, weight, bias = case.arguments()

    def loss(x, weight, bias):
        return (function(x, weight, bias) * grad).sum()

    by_func = torch.func.grad(loss, argnums=(0, 1, 2))(x, weight, bias)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    by_autograd = torch.autograd.grad(loss(*leaves), leaves)
    for mine, theirs in zip(by_func, by_autograd, strict=True):
        assert torch.equal(mine, theirs)


@paths
def test_vmap_over_grad(backend, path):
    """Gradients for several inputs and several parameters at once are those of one after the other.

    In training without tracking, as with nn.BatchNorm: there is one running state, not one for each input.
    """
    layer = CompoundBatchNorm1d(3, 4, track_running_stats=path == "evaluation", dtype=torch.float64)
    layer.train(path != "evaluation")
    grad = torch.randn(6, 3, 5, dtype=torch.float64)
    groups = torch.arange(6) % 4
    several = [
        {name: p + 0.1 * torch.randn(2, *p.shape, dtype=p.dtype) for name, p in layer.named_parameters()},
        torch.randn(2, 6, 3, 5, dtype=torch.float64),
    ]

    def loss(parameters, x):
        with split_path(groups) if path == "split" else contextlib.nullcontext():
            return (torch.func.functional_call(layer, parameters, x) * grad).sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    together = torch.vmap(gradient)(*several)
    for i in range(2):
        parameters, x = gradient({name: p[i] for name, p in several[0].items()}, several[1][i])
        assert_close(together[1][i], x, "grad_input", torch.float64)
        for name, wanted in parameters.items():
            assert_close(together[0][name][i], wanted, "grad_affine", torch.float64)


def test_hessian_vector_product(backend):
    """Forward over what reverse gave: grad of a directional derivative, by torch.func alone."""
    case = case_of("compound", dtype=torch.float64, components=3)
    function = function_of(case)
    x, grad, *_, weight, bias = case.arguments()

    def gradient(x):
        return torch.func.grad(lambda x: (function(x, weight, bias) * grad).sum())(x)

    direction = torch.randn_like(x)
    by_func = torch.func.grad(lambda x: (gradient(x) * direction).sum())(x)
    leaf = x.clone().requires_grad_()
    first = torch.autograd.grad((function(leaf, weight, bias) * grad).sum(), leaf, create_graph=True)[0]
    assert_close(by_func, torch.autograd.grad(first, leaf, direction)[0], "grad_input", torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_call_of_a_layer(backend, training):
    """The layer as torch.func users call it: parameters and buffers as arguments."""
    layer = CompoundBatchNorm2d(5, dtype=torch.float64).train(training)
    x = torch.randn(4, 5, 6, 6, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    buffers = {name: b.clone() for name, b in layer.named_buffers()}

    def loss(parameters, buffers, x):
        return torch.func.functional_call(layer, (parameters, buffers), x).square().sum()

    by_func = torch.func.grad(loss)(parameters, buffers, x)
    twin = copy.deepcopy(layer)
    twin(x).square().sum().backward()
    for name, parameter in twin.named_parameters():
        assert torch.equal(by_func[name], parameter.grad)
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffers[name], buffer)


class Net(nn.Module):
    """The layer between others, as a compiler sees it."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = CompoundBatchNorm2d(8, **options)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"track_running_stats": False}, {"responsibility": "joint"}], ids=str
)
def test_compile_without_graph_breaks(backend, fresh_compiler, training, options):
    """fullgraph=True raises at any break. Outputs, gradients and state are those of eager mode, for two batch sizes."""
    net = Net(**options).train(training)
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for size in (4, 6):
        x = torch.randn(size, 3, 5, 5)
        y, expected = compiled(x), eager(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward(), expected.square().sum().backward()
    for mine, theirs in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(net.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compile_both_paths(backend, fresh_compiler):
    """One compiled network takes the path of the context it is called in, also when that changes."""
    net = Net()
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 3, 5, 5)
    for groups in (None, torch.arange(6) % 4, torch.arange(6) // 2, None):
        if groups is None:
            y, expected = compiled(x), eager(x)
        else:
            with split_path(groups):
                y, expected = compiled(x), eager(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward(), expected.square().sum().backward()
    for mine, theirs in zip([*net.parameters(), *net.buffers()], [*eager.parameters(), *eager.buffers()], strict=True):
        torch.testing.assert_close(mine, theirs)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_compile_with_dynamic_shapes(backend, fresh_compiler):
    net = Net()
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for size, side in ((4, 5), (6, 7), (3, 8)):
        x = torch.randn(size, 3, side, side)
        torch.testing.assert_close(compiled(x), eager(x))


@pytest.mark.parametrize("options", [{}, {"responsibility": "joint"}], ids=["channel", "joint"])
def test_export_of_evaluation(backend, options):
    """With a free batch size; the exported program gives what the layer gives."""
    net = Net(**options).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (torch.randn(4, 3, 5, 5),), dynamic_shapes={"x": {0: batch}})
    for size in (2, 7):
        x = torch.randn(size, 3, 5, 5)
        torch.testing.assert_close(program.module()(x), net(x))


def test_per_sample_gradients_in_evaluation(backend):
    """vmap over the images, one by one, with shared parameters: the sum is the batch's gradient."""
    layer = CompoundBatchNorm1d(3, 4, dtype=torch.float64).eval()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(6, 3, 5, dtype=torch.float64)

    def loss(parameters, image):
        return torch.func.functional_call(layer, parameters, image[None]).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert per_sample[name].shape == (6, *parameter.shape)
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)
