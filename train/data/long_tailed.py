"""Long-tailed subsets: how many images each class keeps, which ones, and which of them validate."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from train.config import DataConfig
from train.errors import UserError


def seed_of(*key: int) -> int:
    """A seed for a random generator that belongs to `key` alone: (1, 2) and (2, 1) have nothing in common."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def long_tailed_counts(num_classes: int, n_max: int, ratio: float) -> list[int]:
    """Images that class i keeps, ``int(n_max · (1/ratio)^(i/(K-1)))``, for i in 0…K-1 (Cui et al. 2019).

    Args:
        num_classes: K.
        n_max: images of the first class.
        ratio: images of the first class over images of the last one.
    """
    exponents = [i / max(num_classes - 1, 1) for i in range(num_classes)]
    # Rounding must not take an image from a class whose share is a whole number (49 · (1/49) < 1 in floating
    # point).
    return [int(n_max * (1 / ratio) ** e + 1e-9) for e in exponents]


def draw(labels: Tensor, counts: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Draw at most ``counts[k]`` images of each class k at random.

    A class's draw depends on nothing but the number of its images and the seed, and a smaller count keeps a
    part of what a larger one keeps, so that subsets of different ratios are nested.

    Args:
        labels: (N,), integers in 0…K-1.
        counts: K numbers.
        seed: seed of the draw.

    Returns:
        Indices into `labels` of the images that are drawn and of those that are not, in ascending order.
    """
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for k, count in enumerate(counts):
        members = torch.nonzero(labels == k).flatten()
        generator = torch.Generator().manual_seed(seed_of(seed, k))
        drawn[members[torch.randperm(len(members), generator=generator)][:count]] = True
    return torch.nonzero(drawn).flatten(), torch.nonzero(~drawn).flatten()


def long_tailed(labels: Tensor, classes: Sequence[str], n_max: int, config: DataConfig) -> Tensor:
    """Indices of the long-tailed training set of a pool of images.

    A class that has fewer images than its share keeps them all; with ratio 1 nothing but `n_max` bounds a
    class.

    Args:
        labels: (N,), class of each image of the pool.
        classes: K names.
        n_max: images of the first class, unless ``config.max_per_class`` is less.
        config: ratio, max_per_class and seed.

    Returns:
        (n,) integer indices into `labels`, in ascending order.

    Raises:
        UserError: the ratio leaves a class without an image.
    """
    if config.max_per_class is not None:
        n_max = min(n_max, config.max_per_class)
    counts = long_tailed_counts(len(classes), n_max, config.ratio)
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise UserError(
            f"data.ratio {config.ratio:g} leaves {len(empty)} of {len(classes)} classes without an image "
            f"({', '.join(empty[:5])}{', …' if len(empty) > 5 else ''}): "
            f"the first class has {n_max}, so the ratio can be at most {n_max}"
        )
    return draw(labels, counts, config.seed)[0]


def split_validation(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Stratified split of training images: indices that train and indices that validate.

    Of a class's n images ``round(fraction · n)`` validate, but at least one where n > 1, and at least one
    trains.

    Args:
        labels: (N,), integers in 0…K-1.
        fraction: in (0, 1).
        seed: seed of the draw.

    Returns:
        Two integer tensors of indices into `labels`, each in ascending order.

    Raises:
        UserError: no class has more than one image.
    """
    counts = torch.bincount(labels).tolist()
    validation, training = draw(labels, [min(max(round(fraction * n), 1), max(n - 1, 0)) for n in counts], seed)
    if len(validation) == 0:
        raise UserError("every class has one training image, so that none can validate; lower data.ratio")
    return training, validation
