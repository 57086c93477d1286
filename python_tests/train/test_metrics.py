"""Accuracies by class and by group."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from train.data.long_tailed import long_tailed_counts
from train.metrics import balanced_accuracy, confusion_matrix, result_rows, shot_groups, summarize


def test_confusion_matrix_and_balanced_accuracy():
    labels, predictions = torch.randint(6, (200,)), torch.randint(6, (200,))
    confusion = confusion_matrix(labels, predictions, 6)
    assert confusion.tolist() == sklearn_confusion(labels, predictions).tolist()
    assert balanced_accuracy(confusion) == pytest.approx(balanced_accuracy_score(labels, predictions))


def test_classes_that_validate_nothing_do_not_count():
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [1, 0, 1]])
    assert balanced_accuracy(confusion) == pytest.approx((0.75 + 0.5) / 2)


def test_bounds_of_the_groups():
    groups = shot_groups(torch.tensor([1000, 101, 100, 50, 20, 19, 1]))
    assert list(groups) == ["many", "medium", "few"]
    assert groups["many"].tolist() == [True, True, False, False, False, False, False]
    assert groups["medium"].tolist() == [False, False, True, True, True, False, False]
    assert groups["few"].tolist() == [False, False, False, False, False, True, True]


@pytest.mark.parametrize(("num_classes", "n_max", "sizes"), [(10, 5000, [8, 2, 0]), (100, 500, [35, 35, 30])])
def test_groups_of_cifar_lt(num_classes, n_max, sizes):
    counts = torch.tensor(long_tailed_counts(num_classes, n_max, 100))
    assert [int(group.sum()) for group in shot_groups(counts).values()] == sizes


def test_summary():
    confusion = torch.tensor([[9, 1, 0], [2, 8, 0], [3, 3, 4]])
    figures = summarize(confusion, torch.tensor([500, 200, 5]), ["ant", "bee", "cat"])
    assert figures["overall"] == pytest.approx(21 / 30)
    assert figures["many"] == pytest.approx(17 / 20)
    assert figures["medium"] is None
    assert figures["few"] == pytest.approx(0.4)
    assert (figures["worst"], figures["worst_class"]) == (pytest.approx(0.4), "cat")
    assert figures["per_class"] == pytest.approx([0.9, 0.8, 0.4])


def test_an_empty_group_is_shown_as_absent():
    figures = summarize(torch.eye(2, dtype=torch.long), torch.tensor([500, 5]), ["a", "b"])
    rows = {row[0]: row[1:] for row in result_rows({"last": figures, "best": figures})}
    assert rows["medium (20 to 100)"] == ("absent", "absent")
    assert rows["overall"] == ("100.0%", "100.0%")
    assert rows["worst class"] == ("100.0% (class a)", "100.0% (class a)")
