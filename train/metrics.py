"""Accuracy per class, per group of classes, and of the worst class."""

from typing import Any

import torch
from torch import Tensor

MANY_ABOVE = 100  # the groups of Liu et al. 2019: many > 100, medium 20…100, few < 20 training images
FEW_BELOW = 20


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Images by true class (rows) and predicted class (columns): (N,), (N,) -> (K, K) integers."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def class_accuracy(confusion: Tensor) -> Tensor:
    """Fraction of each class's images that is right, nan where it has none: (K, K) -> (K,) float64."""
    return confusion.diagonal().double() / confusion.sum(dim=1)


def shot_groups(counts: Tensor) -> dict[str, Tensor]:
    """Which classes have many, a medium number of and few training images: (K,) -> three boolean (K,)."""
    many, few = counts > MANY_ABOVE, counts < FEW_BELOW
    return {"many": many, "medium": ~many & ~few, "few": few}


def summarize(confusion: Tensor, counts: Tensor, classes: list[str]) -> dict[str, Any]:
    """The figures of a run, fractions of the images that are right.

    Args:
        confusion: (K, K), images by true and predicted class; every class has images.
        counts: (K,), training images of each class.
        classes: K names.

    Returns:
        ``overall``; ``many``, ``medium`` and ``few``, None for a group without classes; ``worst`` with
        ``worst_class``; ``per_class``, a list of K.
    """
    right, total = confusion.diagonal(), confusion.sum(dim=1)
    per_class = class_accuracy(confusion)
    worst = int(per_class.argmin())
    groups = {
        name: _fraction(right[group], total[group]) if group.any() else None
        for name, group in shot_groups(counts).items()
    }
    return {
        "overall": _fraction(right, total),
        **groups,
        "worst": float(per_class[worst]),
        "worst_class": classes[worst],
        "per_class": per_class.tolist(),
    }


def _fraction(right: Tensor, total: Tensor) -> float:
    return int(right.sum()) / int(total.sum())


def balanced_accuracy(confusion: Tensor) -> float:
    """Mean accuracy of the classes that have images, from a confusion matrix (K, K).

    It chooses the best checkpoint: the validation images are long-tailed, the test images are not.
    """
    return float(class_accuracy(confusion).nanmean())


def result_rows(final: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (name, last checkpoint, best checkpoint) of a table of a run's test figures, as text."""

    def text(figures: dict[str, Any], name: str) -> str:
        if figures[name] is None:
            return "absent"
        return f"{figures[name]:.1%}" + (f" (class {figures['worst_class']})" if name == "worst" else "")

    labels = {
        "overall": "overall",
        "many": f"many (> {MANY_ABOVE} images)",
        "medium": f"medium ({FEW_BELOW} to {MANY_ABOVE})",
        "few": f"few (< {FEW_BELOW})",
        "worst": "worst class",
    }
    return [(label, text(final["last"], name), text(final["best"], name)) for name, label in labels.items()]
