"""Long-tailed training images, the validation images taken out of them, and the test images."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from train.config import DataConfig
from train.data import digits, image_folder
from train.data.augment import Views, digit_views, photo_views
from train.data.labelled import Labelled
from train.data.long_tailed import split_validation


class Data(NamedTuple):
    """Everything a run reads.

    Attributes:
        name: what the data is called.
        classes: K names, in label order.
        counts: (K,) int64, images of each class in the long-tailed training set. The validation images are
            among
            them: the groups many, medium and few are those of the data, whatever fraction validates.
        train, validation, test: the images.
        views: how training images are augmented.
    """

    name: str
    classes: list[str]
    counts: Tensor
    train: Labelled
    validation: Labelled
    test: Labelled
    views: Views


def load_data(config: DataConfig) -> Data:
    """Read the images that `config` names.

    Raises:
        UserError: anything wrong with the folder, the images or the ratio.
    """
    if config.root is None:
        name, source, make_views = "digits", digits, digit_views
    else:
        name, source, make_views = Path(config.root).resolve().name, image_folder, photo_views
    classes, training, test = source.load(config)
    train, validation = split_validation(training.labels, config.validation, config.seed)
    return Data(
        name=name,
        classes=classes,
        counts=torch.bincount(training.labels, minlength=len(classes)),
        train=training.subset(train),
        validation=training.subset(validation),
        test=test,
        views=make_views(*training.images.shape[-2:]),
    )
