"""The residual networks for small images (He et al. 2016, section 4.2): ResNet-20, 32, 44, 56 and 110."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

NormFactory = Callable[[int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and the identity, (N, in, H, W) -> (N, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = norm(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: subsample, and fill the new channels with zeros, half on each side. No parameters."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        half = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNetCifar(nn.Module):
    """A stem, three stages of 16, 32 and 64 channels, average pooling and a linear classifier.

    Args:
        depth: number of weighted layers, 6n + 2 with n blocks a stage: 20, 32, 44, 56, 110.
        num_classes: number of logits.
        in_channels: channels of the images.
        norm: makes the normalization layer for a number of channels.

    Shape:
        (N, in_channels, H, W) -> (N, num_classes); H and W of at least 1, 32 in the paper.

    Raises:
        ValueError: a depth that is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int = 3, norm: NormFactory = nn.BatchNorm2d) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n at least 1, got {depth}")
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.norm = norm(16)
        self.stage1 = self._stage(blocks, 16, 16, 1, norm)
        self.stage2 = self._stage(blocks, 16, 32, 2, norm)
        self.stage3 = self._stage(blocks, 32, 64, 2, norm)
        self.classifier = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride, norm)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, norm) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(x.mean(dim=(2, 3)))
