"""Models that a graph cannot stand for are refused, with the reason."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbn_ext import convert_compound_batchnorm


class Net(nn.Module):
    """A convolution, a batch normalization and what `body(net, x)` makes of them."""

    def __init__(self, body, **modules):
        super().__init__()
        self.body = body
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.body(self, x)


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
