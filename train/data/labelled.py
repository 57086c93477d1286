"""Images with their labels."""

from typing import NamedTuple

from torch import Tensor


class Labelled(NamedTuple):
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def subset(self, indices: Tensor) -> "Labelled":
        """The images at `indices`, (n,)."""
        return Labelled(self.images[indices], self.labels[indices])
