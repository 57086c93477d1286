"""The weak and the strong view of an image.

Transforms act on one image, (C, H, W) uint8: torchvision draws its random numbers once a call, so a call on a
batch would treat all its images alike. The numbers come from torch's default generator.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from train.data.torchvision_import import import_torchvision

View = Callable[[Tensor], Tensor]


class Views(NamedTuple):
    """Two random transforms of one image, (C, H, W) uint8 -> (C, H, W) uint8."""

    weak: View
    strong: View


def digit_views(height: int, width: int) -> Views:
    """Random crop, and affine jitter.

    No flips: a mirrored 2 or 7 is not a digit, and a mirrored 6 comes near another one.
    """
    v2 = import_torchvision("transforms.v2")
    jitter = v2.RandomAffine(
        degrees=15,
        translate=(0.1, 0.1),
        scale=(0.9, 1.1),
        shear=10,
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return Views(weak=_crop(height, width), strong=jitter)


def photo_views(height: int, width: int) -> Views:
    """Random crop and flip, and the same with AutoAugment after it.

    The policy is the one for CIFAR, which the compound paper uses for CIFAR-10 and CIFAR-100 alike.
    """
    v2 = import_torchvision("transforms.v2")
    weak = v2.Compose([_crop(height, width), v2.RandomHorizontalFlip()])
    return Views(weak=weak, strong=v2.Compose([weak, v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)]))


def _crop(height: int, width: int) -> View:
    """Shift by up to an eighth of the image (4 pixels in 32), filled up with black."""
    v2 = import_torchvision("transforms.v2")
    return v2.RandomCrop((height, width), padding=(width // 8, height // 8))
