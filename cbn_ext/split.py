"""Which group of classes an image belongs to, and the context in which a network takes the split path."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .checks import is_integer

# A plain global: torch.compile traces it, and autograd's threads see it.
_groups: Tensor | None = None


def class_groups(num_classes: int, num_groups: int, order: str = "contiguous") -> Tensor:
    """Split the class labels 0 ... K-1 into equal groups by serial number (paper section 3.3).

    Args:
        num_classes: K.
        num_groups: number of groups, that is of components; at most K.
        order: "contiguous" gives blocks of consecutive labels (head ... tail where classes are sorted by frequency),
            "interleaved" gives label mod `num_groups`.

    Returns:
        The group of every class (K,), int64. `class_groups(10, 4)[labels]` are the groups of a batch's images.
        Where `num_groups` does not divide K the sizes differ by one.

    Raises:
        ValueError: an unknown order, or not 1 <= num_groups <= num_classes.
    """
    if not 1 <= num_groups <= num_classes:
        raise ValueError(f"expected 1 <= num_groups <= num_classes, got {num_groups} groups of {num_classes} classes")
    labels = torch.arange(num_classes)
    if order == "contiguous":
        return labels * num_groups // num_classes
    if order == "interleaved":
        return labels % num_groups
    raise ValueError(f'expected order "contiguous" or "interleaved", got {order!r}')


@contextmanager
def split_path(groups: Tensor) -> Iterator[None]:
    """Let every compound layer in training mode normalise each image with the component of its group.

    Args:
        groups: component of every image of the batch (N,), integer, as `class_groups(K, M)[labels]`.

    Layers in evaluation mode take the compound path as always. Where activations are checkpointed, the forward pass is
    repeated in the backward pass: that one then belongs inside the context, too.

    Raises:
        ValueError: `groups` is not a one-dimensional integer tensor.
    """
    if groups.dim() != 1 or not is_integer(groups):
        raise ValueError(f"expected groups as a 1D integer tensor, got {groups.dim()}D {groups.dtype}")
    global _groups
    outer, _groups = _groups, groups
    try:
        yield
    finally:
        _groups = outer


def current_groups() -> Tensor | None:
    """The groups (N,) of the `split_path` we are in, or None."""
    return _groups
