"""Image folders: any tree of class folders, root/train/<class>/… and root/test/<class>/…"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor

from train.config import DataConfig
from train.data.labelled import Labelled
from train.data.long_tailed import long_tailed
from train.data.torchvision_import import import_torchvision
from train.errors import UserError

LAYOUT = "expected train/<class>/ and test/<class>/ in it, with images in every class folder"

# What Pillow raises, from format to format, on a file it cannot decode.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def load(config: DataConfig) -> tuple[list[str], Labelled, Labelled]:
    """The classes' names, sorted; a long-tailed training set drawn from ``train``; the whole of ``test``.

    Images are (N, 3, H, W) uint8.

    Raises:
        UserError: a folder is missing, a class has no images, ``train`` and ``test`` differ in their classes,
            the ratio leaves a class empty, or an image cannot be used (see `read_images`).
    """
    root = Path(config.root)
    classes, paths, labels = _scan(root / "train")
    test_classes, test_paths, test_labels = _scan(root / "test")
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"data.root: train and test in {root} must have the same classes, but differ in {', '.join(odd)}"
        )
    chosen = long_tailed(labels, classes, int(torch.bincount(labels).max()), config)
    # Read together, so that one bound of memory holds for both and both have one size.
    images = read_images([paths[i] for i in chosen.tolist()] + test_paths, config.image_size, config.memory_gib)
    train_images, test_images = images.split([len(chosen), len(test_paths)])
    return classes, Labelled(train_images, labels[chosen]), Labelled(test_images, test_labels)


def _scan(folder: Path) -> tuple[list[str], list[str], Tensor]:
    """Classes, paths and labels (N,) of the images in the class folders of `folder`."""
    if not folder.is_dir():
        raise UserError(f"data.root: there is no folder {folder}; {LAYOUT}")
    datasets = import_torchvision("datasets")
    try:
        found = datasets.ImageFolder(folder)
    except FileNotFoundError as error:  # no class folder, or one without images: torchvision names it
        raise UserError(f"data.root: {folder}: {error}; {LAYOUT}") from error
    return found.classes, [path for path, _ in found.samples], torch.tensor(found.targets)


def read_images(paths: Sequence[str], image_size: int | None, memory_gib: float) -> Tensor:
    """Decode images into memory.

    Reading them all before training starts finds a broken one then, not in the middle of an epoch, and makes
    the epochs faster.

    Args:
        paths: N files.
        image_size: side to which they are scaled and centre-cropped, or None if they have one size already.
        memory_gib: how much they may take.

    Returns:
        (N, 3, H, W) uint8.

    Raises:
        UserError: a file that is no image or is broken, images of different sizes, too little memory allowed.
    """
    first = _decode(paths[0], image_size)
    gib = len(paths) * first.size / 2**30
    if gib > memory_gib:
        raise UserError(
            f"{len(paths)} images of {first.shape[1]}×{first.shape[0]} need {gib:.1f} GiB of memory, "
            f"data.memory_gib allows {memory_gib:g}: raise it, or lower data.image_size or data.max_per_class"
        )
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)
    for i, path in enumerate(track(paths, "reading images", transient=True)):
        image = _decode(path, image_size)
        if image.shape != first.shape:
            raise UserError(
                f"images of different sizes: {paths[0]} has {first.shape[1]}×{first.shape[0]} pixels, "
                f"{path} has {image.shape[1]}×{image.shape[0]}; set data.image_size to bring all to one size"
            )
        images[i] = image
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _decode(path: str, image_size: int | None) -> np.ndarray:
    """One image, (H, W, 3) uint8."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except DECODING_ERRORS as error:
        raise UserError(f"cannot read the image {path}: {error}") from error
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)
