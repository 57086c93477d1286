"""From nn.BatchNorm to the compound layers in a whole network."""

import copy

import pytest
import torch
from torch import nn

from cbn_ext import CompoundBatchNorm1d, CompoundBatchNorm2d, CompoundBatchNorm3d, convert_compound_batchnorm

PAIRS = [
    (nn.BatchNorm1d, CompoundBatchNorm1d, (16, 5)),
    (nn.BatchNorm1d, CompoundBatchNorm1d, (8, 5, 6)),
    (nn.BatchNorm2d, CompoundBatchNorm2d, (8, 5, 6, 6)),
    (nn.BatchNorm3d, CompoundBatchNorm3d, (8, 5, 3, 4, 5)),
]
PAIR_IDS = ["1d-NC", "1d-NCL", "2d", "3d"]


def trained(norm, shape):
    """Batch normalization with statistics and affine parameters far from the start values."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):
        norm(5 + 3 * torch.randn(shape).to(norm.running_mean))
    return norm


@pytest.mark.parametrize(("norm", "compound", "shape"), PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("components", [1, 2, 4, 16])
@pytest.mark.parametrize("options", [{}, {"responsibility": "joint"}], ids=["channel", "joint"])
def test_trained_layer_is_reproduced(norm, compound, shape, components, options):
    """In evaluation, to rounding, far out of the mixture too: the branches are one function."""
    theirs = trained(norm(5, eps=1e-2), shape).eval()
    ours = convert_compound_batchnorm(theirs, components, **options)
    assert type(ours) is compound and ours.num_components == components
    x = 5 + 20 * torch.randn(shape)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean_over_std", [0, 1e3])
def test_layer_with_small_variance_is_reproduced(mean_over_std):
    """Where epsilon is most of the variance, and where the mean is far from zero."""
    theirs = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    theirs.running_var.fill_(1e-6)
    theirs.running_mean.fill_(mean_over_std * 1e-3)
    ours = convert_compound_batchnorm(copy.deepcopy(theirs))
    x = theirs.running_mean[0] + 1e-2 * torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_mixture_lies_over_the_running_statistics():
    """Its mean and variance are the batch normalization's; the components are spread around it."""
    theirs = trained(nn.BatchNorm2d(5, dtype=torch.float64), (8, 5, 6, 6))
    ours = convert_compound_batchnorm(theirs, 4)
    prior, mean, var = ours.running_prior, ours.running_mean, ours.running_var
    mixture_mean = (prior * mean).sum(0)
    torch.testing.assert_close(mixture_mean, theirs.running_mean)
    torch.testing.assert_close((prior * (var + (mean - mixture_mean) ** 2)).sum(0), theirs.running_var)
    assert (mean.std(0) > 0.1 * theirs.running_var.sqrt()).all()


def test_unit_start_gives_every_component_the_same_affine_pair():
    """Which the split path needs: no group gets an offset of its own."""
    theirs = trained(nn.BatchNorm2d(5), (8, 5, 6, 6))
    ours = convert_compound_batchnorm(theirs, 4, affine_init="unit")
    for m in range(4):
        assert torch.equal(ours.weight[m], theirs.weight) and torch.equal(ours.bias[m], theirs.bias)
    torch.testing.assert_close(ours.running_mean.mean(0), theirs.running_mean)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["learning", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_attributes_are_preserved(training, requires_grad, dtype):
    theirs = nn.BatchNorm2d(5, eps=1e-3, momentum=None, dtype=dtype).train(training).requires_grad_(requires_grad)
    theirs.num_batches_tracked.fill_(7)
    ours = convert_compound_batchnorm(theirs, 3)
    assert (ours.num_features, ours.num_components, ours.eps, ours.momentum) == (5, 3, 1e-3, None)
    assert ours.training is training
    assert ours.weight.requires_grad is ours.bias.requires_grad is requires_grad
    assert {t.dtype for t in (*ours.parameters(), ours.running_prior, ours.running_mean, ours.running_var)} == {dtype}
    assert ours.num_batches_tracked == 7


def test_weight_and_bias_are_frozen_apart():
    theirs = nn.BatchNorm2d(5)
    theirs.bias.requires_grad_(False)
    ours = convert_compound_batchnorm(theirs)
    assert ours.weight.requires_grad and not ours.bias.requires_grad


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("track", [True, False], ids=["track", "no_track"])
def test_without_affine_and_without_tracking(affine, track):
    theirs = nn.BatchNorm2d(5, affine=affine, track_running_stats=track)
    ours = convert_compound_batchnorm(theirs)
    assert (ours.affine, ours.track_running_stats) == (affine, track)
    assert (ours.weight is None) is not affine and (ours.running_mean is None) is not track
    assert ours(torch.randn(4, 5, 3, 3)).isfinite().all()


def test_device_is_preserved():
    ours = convert_compound_batchnorm(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to("meta"))
    assert isinstance(ours[1], CompoundBatchNorm2d)
    assert all(t.is_meta for t in ours.state_dict().values())


class Block(nn.Module):
    """One batch normalization under two names here, and (see below) in several blocks."""

    def __init__(self, norm):
        super().__init__()
        self.first = self.second = norm
        self.conv = nn.Conv2d(5, 5, 1)
        self.apart = nn.ModuleDict({"norm": nn.BatchNorm2d(5)})

    def forward(self, x):
        return self.apart["norm"](self.second(self.conv(self.first(x))))


def test_network_with_shared_layers():
    """Converted in place, once each; what was one layer stays one; everything else is the same object."""
    shared = trained(nn.BatchNorm2d(5), (8, 5, 6, 6))
    net = nn.Sequential(Block(shared), nn.ReLU(), Block(shared), nn.GroupNorm(1, 5)).eval()
    names = [name for name, _ in net.named_modules(remove_duplicate=False)]
    convs = [net[0].conv, net[2].conv]
    x = torch.randn(8, 5, 6, 6)
    expected = net(x)
    assert convert_compound_batchnorm(net, 3) is net
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert isinstance(net[0].first, CompoundBatchNorm2d)
    assert net[0].first is net[0].second is net[2].first is net[2].second
    assert net[0].apart["norm"] is not net[2].apart["norm"]
    assert [net[0].conv, net[2].conv] == convs
    assert [name for name, _ in net.named_modules(remove_duplicate=False)] == names
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_torchvision_network():
    """The one line a user writes; the network's output in evaluation stays, and it trains."""
    from torchvision.models import resnet18

    net = resnet18(num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, std=0.1)
    x = torch.randn(4, 3, 32, 32)
    net(x)
    expected = net.eval()(x)
    net = convert_compound_batchnorm(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-3)
    net.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_hooks_are_kept():
    """And removed by their handles."""
    calls = []
    net = nn.Sequential(nn.BatchNorm2d(5))
    handle = net[0].register_forward_hook(lambda module, *_: calls.append(type(module)))
    x = torch.randn(4, 5, 3, 3)
    convert_compound_batchnorm(net)(x)
    handle.remove()
    net(x)
    assert calls == [CompoundBatchNorm2d]


def test_options_reach_the_layers():
    net = convert_compound_batchnorm(
        nn.Sequential(nn.BatchNorm2d(5)),
        2,
        responsibility="joint",
        detach_responsibility=True,
        affine_init="unit",
    )
    assert net[0].num_components == 2 and net[0].responsibility == "joint" and net[0].detach_responsibility
    assert net[0].running_prior.shape == (2,) and net[0].affine_init == "unit"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_component": 3}, TypeError, "num_component"),
        ({"responsibility": "pixel"}, ValueError, "pixel"),
        ({"num_components": 0}, ValueError, "0"),
    ],
)
def test_wrong_options(options, error, message):
    net = nn.Sequential(nn.BatchNorm2d(5))
    with pytest.raises(error, match=message):
        convert_compound_batchnorm(net, **options)
    assert type(net[0]) is nn.BatchNorm2d


def test_network_without_batchnorm_is_left_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    assert convert_compound_batchnorm(net) is net and [type(m) for m in net] == [nn.Linear, nn.LayerNorm]
