"""scikit-learn's handwritten digits: 1797 scans of 8×8 pixels in 17 grey levels, shipped with the library."""

import torch

from train.config import DataConfig
from train.data.labelled import Labelled
from train.data.long_tailed import draw, long_tailed

TEST_PER_CLASS = 50
N_MAX = 120  # training images of the first class; every digit has at least 124 beside its test images


def load(config: DataConfig) -> tuple[list[str], Labelled, Labelled]:
    """The classes' names, a long-tailed training set and a balanced test set of 50 images a class.

    Images are (N, 1, 8, 8) uint8.

    Raises:
        UserError: the ratio leaves a class without an image.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    classes = [str(name) for name in digits.target_names]
    test, rest = draw(labels, [TEST_PER_CLASS] * len(classes), config.seed)
    train = rest[long_tailed(labels[rest], classes, N_MAX, config)]
    return classes, Labelled(images[train], labels[train]), Labelled(images[test], labels[test])
