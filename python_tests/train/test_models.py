"""The CIFAR ResNets."""

from functools import partial

import pytest
import torch
from torch import nn

from cbn_ext import CompoundBatchNorm2d
from train.models.resnet_cifar import ResNetCifar


def parameters_by_formula(depth, num_classes):
    """Stem, three stages of n blocks of two convolutions, two numbers a normalized channel, classifier."""
    n = (depth - 2) // 6

    def layer(c_in, c_out):
        return 9 * c_in * c_out + 2 * c_out

    stages = sum(layer(c_in, c) + (2 * n - 1) * layer(c, c) for c_in, c in ((16, 16), (16, 32), (32, 64)))
    return layer(3, 16) + stages + 64 * num_classes + num_classes


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)  # the table of He et al. 2016
def test_parameters(depth, millions):
    count = sum(p.numel() for p in ResNetCifar(depth, 10).parameters())
    assert count == parameters_by_formula(depth, 10)
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.005)


def test_weighted_layers():
    convolutions = [m for m in ResNetCifar(32, 10).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(convolutions) == 32


def test_shapes_of_the_stages():
    model = ResNetCifar(20, 7, in_channels=1)
    shapes = []
    for stage in (model.stage1, model.stage2, model.stage3):
        stage.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


def test_shortcut_subsamples_and_pads_with_zeros():
    block = ResNetCifar(20, 10).stage2[0]
    x = torch.randn(2, 16, 7, 7)
    y = block.shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_block_is_the_residual_formula():
    block = ResNetCifar(20, 10).stage1[1].eval()
    x = torch.randn(2, 16, 6, 6)
    inner = block.norm2(block.conv2(torch.relu(block.norm1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.relu(inner + x))


def test_every_norm_comes_from_the_factory():
    norm = partial(CompoundBatchNorm2d, num_components=3, responsibility="joint")
    model = ResNetCifar(20, 10, norm=norm)
    norms = [m for m in model.modules() if isinstance(m, CompoundBatchNorm2d)]
    assert len(norms) == 19
    assert all(m.num_components == 3 and m.responsibility == "joint" for m in norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_depth_that_does_not_exist():
    with pytest.raises(ValueError, match=r"6n \+ 2 with n at least 1, got 21"):
        ResNetCifar(21, 10)
