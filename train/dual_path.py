"""Dual-path learning: one step of section 3.4 of the compound batch normalization paper."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cbn_ext import split_path
from train.config import LossConfig
from train.losses import balanced_softmax, consistency


class DualPathLoss(NamedTuple):
    """Weighted sum and terms of a step (scalars), and the first path's logits of the strong views (N, K)."""

    total: Tensor
    first: Tensor
    second: Tensor
    consistency: Tensor
    logits: Tensor


def dual_path_loss(
    model: nn.Module,
    strong: Tensor,
    weak: Tensor,
    labels: Tensor,
    counts: Tensor,
    groups: Tensor | None,
    weights: LossConfig,
) -> DualPathLoss:
    """Balanced softmax of both paths on the strong views, and their consistency with the weak views.

    Both paths go through the same weights. The first is the network as it is; in the second, the compound
    layers normalise each class group apart. Without groups the second path is the first one again, which makes
    the fair baseline: the same passes, views and terms, and no split.

    Args:
        model: maps images (N, C, H, W) to logits (N, K); in training mode.
        strong: strongly augmented images, (N, C, H, W).
        weak: weakly augmented views of the same images, (N, C, H, W).
        labels: (N,), integers in 0…K-1.
        counts: (K,), training images of each class.
        groups: (N,), class group of each image, or None for no split.
        weights: weight of each term.
    """

    def second_path() -> AbstractContextManager:
        return nullcontext() if groups is None else split_path(groups)

    # Stop-gradient (eq. 19): the weak passes only give targets, so no graph of them is kept.
    with torch.no_grad():
        weak_first = model(weak)
        with second_path():
            weak_second = model(weak)
    strong_first = model(strong)
    with second_path():
        strong_second = model(strong)

    first = balanced_softmax(strong_first, labels, counts)
    second = balanced_softmax(strong_second, labels, counts)
    agreement = consistency((strong_first, strong_second), (weak_first, weak_second))
    total = weights.first * first + weights.second * second + weights.consistency * agreement
    return DualPathLoss(total, first, second, agreement, strong_first)
