"""The split path: groups of classes, each normalised as by a batch normalization of its own, and its context."""

import copy
import threading

import pytest
import torch
from torch import nn

from cbn_ext import (
    CompoundBatchNorm1d,
    CompoundBatchNorm2d,
    CompoundBatchNorm3d,
    class_groups,
    compound_batch_norm,
    split_batch_norm,
    split_path,
)
from python_tests.support.cases import Case
from python_tests.support.tolerances import assert_close


@pytest.mark.parametrize(
    ("classes", "groups", "order", "expected"),
    [
        (8, 4, "contiguous", [0, 0, 1, 1, 2, 2, 3, 3]),
        (8, 4, "interleaved", [0, 1, 2, 3, 0, 1, 2, 3]),
        (5, 1, "contiguous", [0, 0, 0, 0, 0]),
        (3, 3, "contiguous", [0, 1, 2]),
        (3, 3, "interleaved", [0, 1, 2]),
        (5, 2, "interleaved", [0, 1, 0, 1, 0]),
    ],
)
def test_class_groups(classes, groups, order, expected):
    result = class_groups(classes, groups, order)
    assert result.dtype == torch.long and result.tolist() == expected


@pytest.mark.parametrize("classes", [16, 100, 365, 1000, 8142])
@pytest.mark.parametrize("groups", [2, 4, 7, 16])
def test_class_groups_are_equal_and_in_order(classes, groups):
    """As equal as a division allows; contiguous blocks keep the order of the labels. Contiguous is the default."""
    for order in ("contiguous", "interleaved"):
        counts = class_groups(classes, groups, order).bincount(minlength=groups)
        assert len(counts) == groups and counts.max() - counts.min() <= 1
    assert (class_groups(classes, groups).diff() >= 0).all()


@pytest.mark.parametrize(("classes", "groups"), [(3, 4), (3, 0), (3, -1), (0, 1)])
def test_class_groups_refuses_empty_groups(classes, groups):
    with pytest.raises(ValueError, match=rf"{groups}.*{classes}|{classes}.*{groups}"):
        class_groups(classes, groups)


def test_class_groups_refuses_an_unknown_order():
    with pytest.raises(ValueError, match=r"contiguous.*interleaved.*'?random'?"):
        class_groups(10, 4, order="random")


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (CompoundBatchNorm1d, nn.BatchNorm1d, (12, 5)),
        (CompoundBatchNorm1d, nn.BatchNorm1d, (9, 5, 7)),
        (CompoundBatchNorm2d, nn.BatchNorm2d, (8, 5, 6, 3)),
        (CompoundBatchNorm3d, nn.BatchNorm3d, (8, 5, 2, 3, 4)),
    ],
    ids=["1d-NC", "1d-NCL", "2d", "3d"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("responsibility", ["channel", "joint"])
def test_each_group_is_a_batchnorm(backend, layer, norm, shape, dtype, momentum, affine, responsibility):
    """Outputs, gradients and running state of every group are nn.BatchNorm's on the group's images alone.

    Also in a joint layer: the split path does not ask for responsibilities, so the native operator serves it there.
    """
    ours = layer(shape[1], 3, momentum=momentum, affine=affine, responsibility=responsibility, dtype=dtype)
    prior = ours.running_prior.clone()
    norms = [norm(shape[1], momentum=momentum, affine=affine, dtype=torch.float64) for _ in range(3)]
    for m, group_norm in enumerate(norms):
        group_norm.running_mean.copy_(ours.running_mean[m])
        group_norm.running_var.copy_(ours.running_var[m])
        if affine:
            nn.init.normal_(ours.weight[m]), nn.init.normal_(ours.bias[m])
            group_norm.load_state_dict({"weight": ours.weight[m], "bias": ours.bias[m]}, strict=False)

    for _ in range(2):
        ours.zero_grad()
        groups = torch.arange(shape[0])[torch.randperm(shape[0])] % 3
        x = (1 + 2 * torch.randn(shape, dtype=dtype)).requires_grad_()
        grad = torch.randn(shape, dtype=dtype)
        with split_path(groups):
            y = ours(x)
        y.backward(grad)
        for m, group_norm in enumerate(norms):
            group_norm.zero_grad()
            images = x.detach()[groups == m].double().requires_grad_()
            expected = group_norm(images)
            expected.backward(grad[groups == m].double())
            assert_close(y[groups == m], expected, "output", dtype)
            assert_close(x.grad[groups == m], images.grad, "grad_input", dtype)
            assert_close(ours.running_mean[m], group_norm.running_mean, "statistics", dtype)
            assert_close(ours.running_var[m], group_norm.running_var, "statistics", dtype)
            if affine:
                assert_close(ours.weight.grad[m], group_norm.weight.grad, "grad_affine", dtype)
                assert_close(ours.bias.grad[m], group_norm.bias.grad, "grad_affine", dtype)
    assert torch.equal(ours.running_prior, prior)
    assert ours.num_batches_tracked == 2


def test_absent_group_updates_nothing(backend):
    """Bit for bit, whatever the momentum, and its affine pair gets a zero gradient."""
    layer = CompoundBatchNorm2d(7, 4)
    groups = torch.tensor([0, 3, 3, 0])
    for momentum in (0.1, 0.37, None, 1.0):
        layer.momentum = momentum
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.1, 3)
        before = copy.deepcopy(layer.state_dict())
        with split_path(groups):
            layer(torch.randn(4, 7, 5, 5)).square().sum().backward()
        for name in ("running_mean", "running_var"):
            after = getattr(layer, name)
            assert torch.equal(after[1:3], before[name][1:3])
            assert (after[[0, 3]] != before[name][[0, 3]]).all()
        assert torch.equal(layer.running_prior, before["running_prior"])
    assert not layer.weight.grad[1:3].any() and not layer.bias.grad[1:3].any()
    assert layer.weight.grad[[0, 3]].all()


def test_group_of_one_value_is_finite(backend):
    """Alone in its group, a value has no deviation but for rounding: y is the group's bias, the gradient zero."""
    layer = CompoundBatchNorm1d(3, 4)
    x = torch.randn(5, 3, requires_grad=True)
    groups = torch.tensor([2, 0, 0, 0, 1])
    with split_path(groups):
        y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    alone = [0, 4]
    # Two roundings of x and of the gradient, and 1/std is 1/sqrt(eps).
    rounding = 2 * torch.finfo(x.dtype).eps * layer.weight[groups] / layer.eps**0.5
    assert ((y - layer.bias[groups]).abs() <= rounding * x.abs())[alone].all()
    assert (x.grad.abs() <= rounding * grad.abs())[alone].all()
    assert all(t.isfinite().all() for t in (x.grad, layer.weight.grad, *layer.state_dict().values()))
    assert (layer.running_var >= 0).all()


def test_one_value_in_the_whole_batch_is_refused(backend):
    layer = CompoundBatchNorm1d(3, 4)
    with split_path(torch.tensor([2])), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3))


def test_empty_batch(backend):
    layer = CompoundBatchNorm2d(3, 4)
    before = copy.deepcopy(layer.state_dict())
    with split_path(torch.zeros(0, dtype=torch.long)):
        assert layer(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    for name in ("running_prior", "running_mean", "running_var"):
        assert torch.equal(getattr(layer, name), before[name])


def test_evaluation_takes_the_compound_path(backend):
    layer = CompoundBatchNorm2d(3, 4, affine_init="unit").eval()
    x = torch.randn(6, 3, 4, 4)
    expected = layer(x)
    with split_path(torch.arange(6) % 4):
        assert torch.equal(layer(x), expected)
        with torch.no_grad():
            assert not torch.equal(layer.train()(x), expected)


def test_layer_without_tracking(backend):
    layer = CompoundBatchNorm2d(3, 4, track_running_stats=False)
    x, groups = torch.randn(6, 3, 4, 4), torch.arange(6) % 4
    with split_path(groups):
        y = layer(x)
    mean, var = torch.zeros(4, 3), torch.ones(4, 3)
    assert torch.equal(y, split_batch_norm(x, groups, mean, var, layer.weight, layer.bias))


def test_context_reaches_every_layer_below(backend):
    """A network's forward signature does not change; both paths go through the same weights."""

    def conv():
        return nn.Conv2d(4, 4, 3, padding=1)

    net = nn.Sequential(conv(), CompoundBatchNorm2d(4), nn.ReLU(), nn.Sequential(conv(), CompoundBatchNorm2d(4)))
    x, groups = torch.randn(8, 4, 5, 5), torch.arange(8) % 4
    prior = [net[1].running_prior.clone(), net[3][1].running_prior.clone()]
    with split_path(groups):
        net(x).sum().backward()
    assert torch.equal(net[1].running_prior, prior[0]) and torch.equal(net[3][1].running_prior, prior[1])
    assert all(p.grad is not None for p in net.parameters())
    net(x)
    assert not torch.equal(net[1].running_prior, prior[0]) and not torch.equal(net[3][1].running_prior, prior[1])


def path_taken(groups_a, groups_b):
    """Which of two groupings, "a", "b" or None for the compound path, the current context selects."""
    x = torch.arange(24.0).reshape(6, 1, 4).sin()
    mean, var = torch.zeros(2, 1), torch.ones(2, 1)
    layer = CompoundBatchNorm1d(1, 2, affine=False, momentum=0.0)
    y = layer(x)
    for name, groups in (("a", groups_a), ("b", groups_b)):
        if torch.equal(y, split_batch_norm(x, groups, mean.clone(), var.clone(), None, None)):
            return name
    prior = torch.full((2, 1), 0.5)
    running = layer.running_mean.clone(), layer.running_var.clone()
    assert torch.equal(y, compound_batch_norm(x, prior, *running, None, None, training=True))
    return None


def test_context_nests_and_restores():
    a, b = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0, 1])
    assert path_taken(a, b) is None
    with split_path(a):
        assert path_taken(a, b) == "a"
        with split_path(b):
            assert path_taken(a, b) == "b"
        assert path_taken(a, b) == "a"
        with pytest.raises(ZeroDivisionError), split_path(b):
            raise ZeroDivisionError
        assert path_taken(a, b) == "a"
    assert path_taken(a, b) is None
    with pytest.raises(ZeroDivisionError), split_path(a):
        raise ZeroDivisionError
    assert path_taken(a, b) is None


def test_context_holds_in_other_threads():
    """Where autograd may recompute a checkpointed layer."""
    a, b = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0, 1])
    seen = []
    with split_path(a):
        thread = threading.Thread(target=lambda: seen.append(path_taken(a, b)))
        thread.start()
        thread.join()
    assert seen == ["a"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_any_integer_groups(backend, dtype):
    case = Case(mode="split")
    x, _, _, groups, _, mean, var, weight, bias = case.arguments()
    expected = split_batch_norm(x, groups, mean.clone(), var.clone(), weight, bias)
    assert torch.equal(split_batch_norm(x, groups.to(dtype), mean, var, weight, bias), expected)


@pytest.mark.parametrize("bad", [4, -1, 100])
def test_groups_out_of_range(backend, bad):
    """An error that names the value and the largest one allowed; the running statistics stay as they were."""
    layer = CompoundBatchNorm2d(3, 4)
    before = copy.deepcopy(layer.state_dict())
    with split_path(torch.tensor([0, bad, 1])), pytest.raises((RuntimeError, ValueError), match=rf"3.*{bad}"):
        layer(torch.randn(3, 3, 4, 4))
    for name in ("running_prior", "running_mean", "running_var"):
        assert torch.equal(getattr(layer, name), before[name])


def test_wrong_number_of_groups(backend):
    with split_path(torch.tensor([0, 1])), pytest.raises((RuntimeError, ValueError), match=r"3.*2"):
        CompoundBatchNorm2d(3, 4)(torch.randn(3, 3, 4, 4))


@pytest.mark.parametrize("groups", [torch.tensor([0.0, 1.0]), torch.tensor([True, False]), torch.tensor([[0], [1]])])
def test_wrong_groups(backend, groups):
    given = str(groups.dtype) if groups.ndim == 1 else r"\(2, 1\)|2D"
    with pytest.raises((RuntimeError, ValueError), match=given), split_path(groups):
        pytest.fail("entered with groups that are no 1D integer tensor")
    with pytest.raises((RuntimeError, ValueError), match=given):
        split_batch_norm(torch.randn(2, 3), groups, torch.zeros(2, 3), torch.ones(2, 3), None, None)


def test_groups_on_another_device(backend):
    with pytest.raises(RuntimeError, match="meta"):
        split_batch_norm(
            torch.randn(2, 3),
            torch.tensor([0, 1], device="meta"),
            torch.zeros(2, 3),
            torch.ones(2, 3),
            None,
            None,
        )
