"""Batches of augmented views whose randomness is a function of (seed, epoch, image).

Nothing depends on what was drawn before, so a run that is resumed, or that uses another number of workers,
sees the same pixels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from train.data.augment import View
from train.data.labelled import Labelled
from train.data.long_tailed import seed_of


class AugmentedImages(Dataset):
    """Views of images, addressed by (epoch, index).

    Args:
        data: N images.
        views: one transform for each view that is wanted.
        seed: seed of the augmentation.
    """

    def __init__(self, data: Labelled, views: Sequence[View], seed: int) -> None:
        self.data, self.views, self.seed = data, views, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        """The views of image `index` in this epoch, each (C, H, W) uint8, and its label."""
        epoch, index = key
        # torchvision draws from the default generator, and takes no other one.
        torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
        image = self.data.images[index]
        return *(view(image) for view in self.views), self.data.labels[index]


class EpochBatches(Sampler):
    """Batches of keys (epoch, index) in the random order of an epoch, for `AugmentedImages`.

    The batches are of equal size but for one image, so that none is left over with too few images for batch
    statistics.

    Args:
        num_images: N.
        batch_size: upper bound of a batch.
        seed: seed of the order.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0
        self.num_batches = -(-num_images // batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        for batch in order.tensor_split(self.num_batches):
            yield [(self.epoch, index) for index in batch.tolist()]


def training_loader(dataset: AugmentedImages, batches: EpochBatches, workers: int, pin_memory: bool) -> DataLoader:
    """Loader of (views…, labels): each view (n, C, H, W) uint8, labels (n,)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )
