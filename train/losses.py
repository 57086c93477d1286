"""Losses of long-tailed learning."""

import torch
import torch.nn.functional as F
from torch import Tensor


def balanced_softmax(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Balanced softmax (Ren et al. 2020; eq. 20 of the compound paper): cross-entropy of ``logits + log counts``.

    The prior of the training set is added to the logits, so that what the network learns is free of it.

    Args:
        logits: (N, K).
        labels: (N,), integers in 0…K-1.
        counts: (K,), training images of each class, all positive.

    Returns:
        The mean over the batch, a scalar.
    """
    return F.cross_entropy(logits + counts.to(logits.dtype).log(), labels)


def consistency(strong: tuple[Tensor, Tensor], weak: tuple[Tensor, Tensor]) -> Tensor:
    """Symmetric consistency of two paths with stop-gradient (eq. 19).

    Each path's logits of the strong views are drawn towards the *other* path's logits of the weak views.

    Args:
        strong: logits (N, K) of the strong views, through the first and through the second path.
        weak: logits (N, K) of the weak views, likewise; treated as constants.

    Returns:
        ``-1/2 [cos(strong_1, weak_2) + cos(strong_2, weak_1)]``, averaged over the batch: a scalar in [-1, 1].
    """
    first = F.cosine_similarity(strong[0], weak[1].detach(), dim=1)
    second = F.cosine_similarity(strong[1], weak[0].detach(), dim=1)
    return -0.5 * torch.mean(first + second)
