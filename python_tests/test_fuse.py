"""convert_compound_batchnorm(fuse=True): what is fused computes what the unfused does; what is not has a reason."""

import copy
import operator
import re

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
    "one ReLU twice": (lambda n, x: n.relu(n.norm2(n.conv(n.relu(n.norm(x))))), {"norm": False, "norm2": False}),
    "pre-activation": (pre_activation, {"norm": False, "norm2": False}),
    "two norms": (out_plus(lambda n, x: n.norm2(n.conv2(x))), {"norm": True}),
    "two norms, the shortcut first": (shortcut_first, {"norm": True}),
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


def input_overwritten(net, x):
    out = net.conv(x)
    return F.relu(net.norm(out) + F.relu(out, inplace=True))


def view_of_input_overwritten(net, x):
    out = net.conv(x)
    normalized = net.norm(out.view(out.shape))
    out.mul_(2)
    return F.relu(normalized + x)


def residual_overwritten(net, x):
    shortcut = net.conv2(x)
    return F.relu(shortcut.add_(net.norm(net.conv(x)))) + shortcut


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
    "in place into the other": (residual_overwritten, "norm", "in place"),
    "input overwritten": (input_overwritten, "norm", "relu, before the sum"),
    "view of the input overwritten": (view_of_input_overwritten, "norm", "mul_, before the sum"),
    "difference": (lambda n, x: F.relu(n.norm(x) - x), "norm", "goes to sub"),
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


class Training(Net):
    """A forward that asks for the mode, in a module inside the model."""

    def forward(self, x):
        return F.dropout(F.relu(self.norm(x)), 0.1, self.training)


def sets_attribute(net, x):
    net.features = F.relu(net.norm(x))
    return net.features


def switches_gradients(net, x):
    with torch.no_grad():
        x = net.conv(x)
    return F.relu(net.norm(x))


def switches_autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(net.norm(x))


class Frozen(Net):
    """Keeps its normalizations in evaluation."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


def hooked(where):
    net = nn.Sequential(Net(lambda n, x: F.relu(n.norm(x))))
    net.get_submodule(where).register_forward_hook(lambda *_: None)
    return net


@torch.fx.wrap
def run(module, x):
    return module(x)


def replaced_forward():
    net = Net(lambda n, x: F.relu(n.norm(x)))
    net.forward = lambda x: x
    return net


REFUSED = {
    "control flow": (lambda: Net(lambda n, x: F.relu(n.norm(x)) if x.sum() > 0 else x), "control flow"),
    "training": (lambda: nn.Sequential(Training(None)), "forward of '0' (Training) depends on `training`"),
    "training, model": (
        lambda: Net(lambda n, x: F.relu(n.norm(n.conv(x) if n.training else x))),
        "its forward depends on `training`",
    ),
    "attribute": (lambda: Net(sets_attribute), "sets attributes, which a graph does not: features"),
    "tensor": (lambda: Net(lambda n, x: F.relu(n.norm(x)) + torch.ones(3, 1, 1)), "neither a parameter nor a buffer"),
    "no_grad": (lambda: Net(switches_gradients), "switches gradients or autocast"),
    "autocast": (lambda: Net(switches_autocast), "switches gradients or autocast"),
    "hooks": (lambda: hooked("0"), "'0' (Net) has hooks"),
    "hooks, model": (lambda: hooked(""), "the model has hooks"),
    "other forward": (replaced_forward, "a forward of its own"),
    "train": (lambda: Frozen(lambda n, x: F.relu(n.norm(x))), "overrides train()"),
    "module as an argument": (
        lambda: Net(lambda n, x: run(n.inner, x), inner=nn.Sequential(nn.BatchNorm2d(3))),
        "passes a module",
    ),
    "error": (lambda: Net(lambda n, x: n.missing(x)), "missing"),
    "no forward": (lambda: nn.ModuleList([nn.BatchNorm2d(3)]), "forward"),
    "the norm alone": (lambda: nn.BatchNorm2d(3), "BatchNorm2d cannot be fused"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(make, reason):
    """By an error that says why and what to do; the model has not changed, and converts without fusing."""
    model = make()
    model.eval()
    before = [(module, dict(vars(module))) for module in model.modules()]
    with pytest.raises(ValueError, match=f"{re.escape(reason)}.*fuse=False"):
        convert_compound_batchnorm(model, fuse=True)
    after = [(module, dict(vars(module))) for module in model.modules()]
    assert before == after
    convert_compound_batchnorm(model)


def test_wrong_options_are_named():
    model = Net(FUSED["module"][0])
    with pytest.raises(ValueError, match="pixel"):
        convert_compound_batchnorm(model, fuse=True, responsibility="pixel")
    with pytest.raises(TypeError, match="eps"):
        convert_compound_batchnorm(model, fuse=True, eps=1)
    assert type(model.norm) is nn.BatchNorm2d
