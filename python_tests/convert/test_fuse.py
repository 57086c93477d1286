"""convert_compound_batchnorm(fuse=True): what is fused computes what the unfused does; what is not has a reason."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from cbn_ext import (
    CompoundBatchNorm2d,
    CompoundBatchNormAct2d,
    convert_compound_batchnorm,
)
from train.models.resnet_cifar import ResNetCifar


def randomize(model, x):
    """Statistics and affine parameters far from the start values, so that the ReLUs and the branches matter."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    model.train()(x)
    return model


def convert_both(model, **options):
    """The network fused, and not fused, of the same start."""
    fused, plain = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(1)
    fused = convert_compound_batchnorm(fused, fuse=True, **options)
    torch.manual_seed(1)
    return fused, convert_compound_batchnorm(plain, **options)


def assert_same_network(fused, plain, x):
    """Names, state, outputs, running statistics after a step and gradients, in float64 to rounding."""
    close = {"rtol": 1e-9, "atol": 1e-11}
    ours, theirs = fused.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), **close)

    results = []
    for network in (fused, plain):
        image = x.clone().requires_grad_()
        y = network.train()(image)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append((y, image.grad, [p.grad for p in network.parameters()], network.state_dict()))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, **close)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), **close)


def counts(fused):
    """Norms, fused norms, and those fused with a sum."""
    fusions = fused.meta["fusions"]
    return len(fusions), sum(f.reason is None for f in fusions), sum(f.residual for f in fusions)


def torchvision_model(name):
    return getattr(models, name)(num_classes=10)


NETWORKS = {
    "resnet18": (lambda: torchvision_model("resnet18"), 20, 17, 8),
    "resnet50": (lambda: torchvision_model("resnet50"), 53, 49, 16),
    "vgg11_bn": (lambda: torchvision_model("vgg11_bn").features, 8, 8, 0),
    "mobilenet_v2": (lambda: torchvision_model("mobilenet_v2"), 52, 0, 0),
    "shufflenet_v2_x0_5": (lambda: torchvision_model("shufflenet_v2_x0_5"), 56, 37, 0),
    "cifar": (lambda: ResNetCifar(20, 10), 19, 19, 9),
}


@pytest.mark.parametrize(("make", "norms", "fused_norms", "residuals"), NETWORKS.values(), ids=NETWORKS)
def test_networks(make, norms, fused_norms, residuals):
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    fused, plain = convert_both(randomize(make().double(), x))
    assert counts(fused) == (norms, fused_norms, residuals)
    assert_same_network(fused, plain, x)


class Net(nn.Module):
    """A convolution, two batch normalizations and what `body(net, x)` makes of them."""

    def __init__(self, body, **modules):
        super().__init__()
        self.body = body
        self.conv, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.act, self.relu, self.relu6 = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()
        self.add = nn.Dropout(0.0)
        self.named = nn.ModuleDict({"add": nn.Tanh(), "relu": nn.Tanh()})
        self.tail = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1))
        self.scale = nn.Parameter(torch.rand(3, 1, 1))
        self.register_buffer("shift", torch.rand(3, 1, 1), persistent=False)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.body(self, x)


def out_plus(residual):
    """relu(norm(conv(x)) + residual(x)), with the sum in place."""

    def body(net, x):
        out = net.norm(net.conv(x))
        out += residual(net, x)
        return net.relu(out)

    return body


def pre_activation(net, x):
    out = net.conv(net.act(net.norm(x)))
    return x + net.conv2(F.relu(net.norm2(out)))


def shortcut_first(net, x):
    shortcut = net.norm2(net.conv2(x))
    out = net.norm(net.conv(x))
    out += shortcut
    return F.relu(out, inplace=True)


def in_place_into_a_new_shortcut(net, x):
    shortcut = net.conv2(x)
    shortcut += net.norm(net.conv(x))
    return F.relu(shortcut)


def second_name(net, x):
    out = net.conv(x)
    count = batch = x.shape[0]
    same = out
    out *= 3
    count += 1
    out -= count - batch
    return F.relu(net.norm(same)) + same


# What the body computes from norm (and norm2), and which of them are fused with a sum, alone or not.
FUSED = {
    "module": (lambda n, x: n.act(n.norm(x)), {"norm": False}),
    "module in place": (lambda n, x: n.relu(n.norm(x)), {"norm": False}),
    "F.relu": (lambda n, x: F.relu(n.norm(x)), {"norm": False}),
    "F.relu in place": (lambda n, x: F.relu(input=n.norm(input=x), inplace=True), {"norm": False}),
    "F.relu_": (lambda n, x: F.relu_(n.norm(x)), {"norm": False}),
    "torch.relu": (lambda n, x: torch.relu(n.norm(x)), {"norm": False}),
    "torch.relu_": (lambda n, x: torch.relu_(n.norm(x)), {"norm": False}),
    "relu": (lambda n, x: n.norm(x).relu(), {"norm": False}),
    "relu_": (lambda n, x: n.norm(x).relu_(), {"norm": False}),
    "+": (lambda n, x: F.relu(n.norm(n.conv(x)) + x), {"norm": True}),
    "+ on the right": (lambda n, x: F.relu(x + n.norm(n.conv(x))), {"norm": True}),
    "+=": (out_plus(lambda n, x: x), {"norm": True}),
    "operator.iadd": (lambda n, x: F.relu(operator.iadd(n.norm(x), x)), {"norm": True}),
    "torch.add": (lambda n, x: torch.relu(torch.add(x, other=n.norm(n.conv(x)))), {"norm": True}),
    "torch.add, alpha=1": (lambda n, x: torch.relu(torch.add(n.norm(x), x, alpha=1)), {"norm": True}),
    "add": (lambda n, x: n.norm(x).add(n.conv(x)).relu(), {"norm": True}),
    "add_": (lambda n, x: n.norm(x).add_(x).relu_(), {"norm": True}),
    "residual computed later": (out_plus(lambda n, x: n.conv2(n.conv(x).sin())), {"norm": True}),
    "ReLU in a container": (lambda n, x: n.tail(n.norm(x)), {"norm": False}),
    "scaled buffer": (lambda n, x: F.relu(n.norm(x - 2 * n.shift)), {"norm": False}),
    "one ReLU twice": (lambda n, x: n.relu(n.norm2(n.conv(n.relu(n.norm(x))))), {"norm": False, "norm2": False}),
    "pre-activation": (pre_activation, {"norm": False, "norm2": False}),
    "two norms": (out_plus(lambda n, x: n.norm2(n.conv2(x))), {"norm": True}),
    "two norms, the later one written first": (lambda n, x: F.relu(n.norm2(x) + n.norm(n.conv(x))), {"norm2": True}),
    "two norms, the shortcut first": (shortcut_first, {"norm": True}),
    "+= to a new shortcut": (in_place_into_a_new_shortcut, {"norm": True}),
    "*= under two names": (second_name, {"norm": False}),
    "chain": (lambda n, x: F.relu(n.norm2(F.relu(n.norm(x) + x)) + x), {"norm": True, "norm2": True}),
    "residual is fused too": (lambda n, x: F.relu(n.norm(x) + F.relu(n.norm2(x))), {"norm": True, "norm2": False}),
    "ReLU of the residual in place": (out_plus(lambda n, x: n.relu(n.norm2(x))), {"norm": True, "norm2": False}),
}


@pytest.mark.parametrize(("body", "expected"), FUSED.values(), ids=FUSED)
def test_fused(body, expected):
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    fused, plain = convert_both(randomize(Net(body).double(), x))
    assert {f.norm: f.residual for f in fused.meta["fusions"] if f.reason is None} == expected
    for name in ("norm", "norm2"):
        kind = CompoundBatchNormAct2d if name in expected else CompoundBatchNorm2d
        assert type(fused.get_submodule(name)) is kind
    assert_same_network(fused, plain, x)


def view_of_input_overwritten(net, x):
    out = net.conv(x)
    normalized = net.norm(out.view(out.shape))
    out.mul_(2)
    return F.relu(normalized + x)


def residual_overwritten(net, x):
    shortcut = net.conv2(x)
    return F.relu(shortcut.add_(net.norm(net.conv(x)))) + shortcut


def view_added_to(net, x):
    out = net.conv(x)
    part = out.view(out.shape)
    part += net.norm(net.conv2(x))
    return F.relu(part) + out


def relu_in_place_read_elsewhere(net, x):
    out = net.norm(x)
    return F.relu(out, inplace=True) + out


def sum_used_twice(net, x):
    out = net.norm(x) + net.conv(x)
    return F.relu(out) * out


# What the body computes, and a part of the reason why norm is not fused.
NOT_FUSED = {
    "used twice": (lambda n, x: F.relu(n.norm(x)) + n.norm2(x), "norm2", "the model's output"),
    "output read elsewhere": (relu_in_place_read_elsewhere, "norm", "its output is used 2 times"),
    "residual of its own": (lambda n, x: (lambda y: F.relu(y + y.sin()))(n.norm(x)), "norm", "used 2 times"),
    "added to itself": (lambda n, x: (lambda y: F.relu(y + y))(n.norm(x)), "norm", "added to itself"),
    "sum used twice": (sum_used_twice, "norm", "the sum after it is used 2 times"),
    "sum without ReLU": (lambda n, x: n.norm(x) + x, "norm", "the sum after it goes to the model's output"),
    "called twice": (lambda n, x: F.relu(n.norm(F.relu(n.norm(x)))), "norm", "called 2 times"),
    "not called": (lambda n, x: F.relu(n.norm(x)), "norm2", "no call"),
    "ReLU6": (lambda n, x: n.relu6(n.norm(x)), "norm", "ReLU6 'relu6'"),
    "dropout between": (lambda n, x: F.relu(n.add(n.norm(x))), "norm", "Dropout 'add'"),
    "modules of those names": (lambda n, x: n.named["relu"](n.named["add"](n.norm(x))), "norm", "Tanh 'named.add'"),
    "leaky_relu": (lambda n, x: F.leaky_relu(n.norm(x)), "norm", "leaky_relu"),
    "number": (lambda n, x: F.relu(n.norm(x) + 1), "norm", "constant 1"),
    "number on the left": (lambda n, x: F.relu(1.5 + n.norm(x)), "norm", "constant 1.5"),
    "alpha": (lambda n, x: F.relu(torch.add(n.norm(x), x, alpha=2)), "norm", "more arguments"),
    "three summands": (lambda n, x: F.relu(n.norm(x) + x + x), "norm", "goes to add"),
    "parameter": (lambda n, x: F.relu(n.norm(x) + n.scale), "norm", "'scale', which is broadcast"),
    "buffer": (lambda n, x: F.relu(n.norm(x) + n.shift), "norm", "'shift', which is broadcast"),
    "the other of two": (out_plus(lambda n, x: n.norm2(x)), "norm2", "the residual of 'norm'"),
    "+= to a view": (view_added_to, "norm", "in place"),
    "in place into the other": (residual_overwritten, "norm", "in place"),
    "view of the input overwritten": (view_of_input_overwritten, "norm", "mul_, before the sum"),
    "difference": (lambda n, x: F.relu(n.norm(x) - x), "norm", "goes to sub"),
    "difference in place": (lambda n, x: F.relu(operator.isub(n.norm(x), x)), "norm", "goes to isub"),
}


@pytest.mark.parametrize(("body", "norm", "reason"), NOT_FUSED.values(), ids=NOT_FUSED)
def test_not_fused(body, norm, reason):
    """With the reason; and the network is what it was."""
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    fused, plain = convert_both(randomize(Net(body).double(), x))
    (fusion,) = [f for f in fused.meta["fusions"] if f.norm == norm]
    assert reason in fusion.reason and not fusion.residual
    assert type(fused.get_submodule(norm)) is CompoundBatchNorm2d
    assert list(fused.state_dict()) == list(plain.state_dict())
    for mode in (False, True):
        torch.testing.assert_close(fused.train(mode)(x), plain.train(mode)(x), rtol=1e-12, atol=1e-12)


class Double(nn.Module):
    """Writes into its input."""

    def forward(self, x):
        return x.mul_(2)


@torch.fx.wrap
def double(x):
    return x.mul_(2)


OVERWRITING = {
    "module": (lambda n, x: n.relu(x), "ReLU 'relu'"),
    "module of the user's": (lambda n, x: n.inner(x), "Double 'inner'"),
    "function of the user's": (lambda n, x: double(x), "double"),
    "method": (lambda n, x: x.mul_(2), "mul_"),
    "function": (lambda n, x: torch.relu_(x), "relu_"),
    "function, inplace by name": (lambda n, x: F.relu(x, inplace=True), "relu"),
    "function, inplace by position": (lambda n, x: F.relu(x, True), "relu"),
    "function, out": (lambda n, x: torch.mul(x, 2, out=x), "mul"),
    "operator": (lambda n, x: operator.imul(x, 2), "imul"),
    "aten": (lambda n, x: torch.ops.aten.relu_.default(x), "relu_.default"),
}


@pytest.mark.parametrize(("overwrite", "reason"), OVERWRITING.values(), ids=OVERWRITING)
@pytest.mark.parametrize("of", ["conv", "tail"])
def test_input_overwritten_before_the_sum(of, overwrite, reason):
    """The norm must read its input before that; the fused layer would come after it."""

    def body(net, x):
        out = net.get_submodule(of)(x)
        return F.relu(net.norm(out) + overwrite(net, out))

    x = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    fused, plain = convert_both(Net(body, inner=Double()).double())
    assert fused.meta["fusions"][0].reason == f"{reason}, before the sum, may change its input in place"
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


def test_wrong_options_are_named():
    model = Net(FUSED["module"][0])
    with pytest.raises(ValueError, match="pixel"):
        convert_compound_batchnorm(model, fuse=True, responsibility="pixel")
    with pytest.raises(TypeError, match="eps"):
        convert_compound_batchnorm(model, fuse=True, eps=1)
    assert type(model.norm) is nn.BatchNorm2d
