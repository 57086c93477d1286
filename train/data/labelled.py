"""Images with their labels."""

from typing import NamedTuple

import torch
from torch import Tensor


class Labelled(NamedTuple):
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def subset(self, indices: Tensor) -> "Labelled":
        """The images at `indices`, (n,)."""
        return Labelled(self.images[indices], self.labels[indices])

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, of pixels scaled to [0, 1]: (C,) and (C,) float32.

        From the numbers of pixels of each of the 256 values: exact, and without a copy in floating point.
        """
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.images.transpose(0, 1)])
        weights = counts.double() / counts.sum(dim=1, keepdim=True)
        values = torch.linspace(0, 1, 256, dtype=torch.float64)
        mean = weights @ values
        var = (weights * (values - mean[:, None]).square()).sum(dim=1)
        return mean.float(), var.sqrt().float()
