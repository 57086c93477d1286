"""Layers in networks on a GPU: compiled, with autocast, in channels_last, and a training run against the reference."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbn_ext import CompoundBatchNorm2d, CompoundBatchNormAct2d, class_groups, split_path, use_backend


class Block(nn.Module):
    """x + two convolutions with fused layers, (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = CompoundBatchNormAct2d(channels, affine_init="unit")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = CompoundBatchNormAct2d(channels, affine_init="unit")

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), x)


def network(channels=16, classes=8):
    """(N, 3, H, W) -> (N, classes)."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        CompoundBatchNorm2d(channels, affine_init="unit"),
        nn.ReLU(),
        Block(channels),
        nn.MaxPool2d(2),
        Block(channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    ).cuda()


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """Convolutions in float32 and repeatable, so that only the layer's backend differs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def losses(backend, memory_format, steps=8):
    """The losses of a training run of both paths on images whose class shows."""
    torch.manual_seed(1)
    net = network().to(memory_format=memory_format)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    groups_of_class = class_groups(8, 4).cuda()
    seen = []
    with use_backend(backend):
        for _ in range(steps):
            labels = torch.randint(8, (64,)).cuda()
            x = torch.randn(64, 3, 16, 16).cuda() + labels.view(-1, 1, 1, 1) / 4
            x = x.to(memory_format=memory_format)
            loss = F.cross_entropy(net(x), labels)
            with split_path(groups_of_class[labels]):
                loss = loss + F.cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        net.eval()
        with torch.no_grad():
            seen.append(F.cross_entropy(net(x), labels).item())
    return seen


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_run_equals_the_reference(memory_format):
    native, reference = (losses(backend, memory_format) for backend in ("native", "reference"))
    assert native == pytest.approx(reference, rel=1e-3)
    assert native[-2] < 0.9 * native[0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_keeps_the_memory_format(memory_format):
    layer = CompoundBatchNormAct2d(16, device="cuda")
    x = torch.randn(4, 16, 9, 9, device="cuda").to(memory_format=memory_format).requires_grad_()
    y = layer(x, torch.randn_like(x))
    y.sum().backward()
    assert y.is_contiguous(memory_format=memory_format)
    assert x.grad.is_contiguous(memory_format=memory_format)


def test_compiled_network_equals_eager():
    """One graph without breaks, forward and backward."""
    torch._dynamo.reset()
    net, x = Block(8).cuda(), torch.randn(16, 8, 16, 16, device="cuda")
    start = {name: value.clone() for name, value in net.state_dict().items()}
    results = []
    for function in (net, torch.compile(net, fullgraph=True)):
        net.load_state_dict(start)
        y = function(x)
        grads = torch.autograd.grad(y.square().mean(), list(net.parameters()))
        results.append((y.detach(), *grads, *(buffer.clone() for buffer in net.buffers())))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """As nn.BatchNorm: the dtype of the input stays, the statistics and parameters are float32."""
    layer = CompoundBatchNormAct2d(16, device="cuda")
    conv = nn.Conv2d(3, 16, 3, device="cuda")
    x = torch.randn(4, 3, 9, 9, device="cuda")
    with torch.autocast("cuda", dtype):
        hidden = conv(x)
        y = layer(hidden)
        assert layer(x.repeat(1, 6, 1, 1)[:, :16]).dtype == torch.float32
    y.sum().backward()
    assert hidden.dtype == y.dtype == dtype
    assert layer.weight.grad.dtype == conv.weight.grad.dtype == torch.float32
    assert torch.isfinite(conv.weight.grad).all()
