"""The plots of a run's page and the page itself."""

import base64
import io
import re

import pytest
import torch
from PIL import Image
from torch import nn

from cbn_ext import CompoundBatchNorm2d
from train.config import Config
from train.data import Data
from train.data.augment import Views
from train.data.labelled import Labelled
from train.metrics import summarize
from train.models.resnet_cifar import ResNetCifar
from train.plots import class_accuracies, confusion_plot, layer_features, learning_curves, mixture_density
from train.report import report_page


@pytest.mark.parametrize("responsibility", ["channel", "joint"])
def test_features_are_the_input_of_the_layer(responsibility):
    norm = CompoundBatchNorm2d(6, 3, responsibility=responsibility)
    conv = nn.Conv2d(2, 6, 3)
    images = torch.randn(5, 2, 8, 8)
    model = nn.Sequential(conv, norm).train()
    model(images)
    (layer,) = layer_features(model, images, layers=1, channels=3)
    assert (layer.layer, layer.channels) == ("1", [0, 2, 5])
    expected = conv(images)[:, [0, 2, 5]].transpose(0, 1).flatten(1)
    assert torch.equal(layer.values, expected)
    assert torch.equal(layer.mean, norm.running_mean[:, [0, 2, 5]])
    prior = norm.running_prior if responsibility == "joint" else norm.running_prior[:, 2]
    assert torch.equal(layer.prior[:, 1], prior)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, CompoundBatchNorm2d])
def test_features_of_first_middle_and_last_layer(norm):
    layers = layer_features(ResNetCifar(20, 10, norm=norm), torch.randn(4, 3, 16, 16))
    assert [layer.layer for layer in layers] == ["norm", "stage2.1.norm1", "stage3.2.norm2"]
    for layer in layers:
        torch.testing.assert_close(layer.prior.sum(dim=0), torch.ones(3))


def test_mixture_density_integrates_to_the_priors():
    norm = CompoundBatchNorm2d(1, 4)
    norm.running_prior.copy_(torch.tensor([[0.1], [0.2], [0.3], [0.4]]))
    norm.running_var.copy_(torch.tensor([[0.5], [1.0], [2.0], [0.1]]))
    (layer,) = layer_features(nn.Sequential(norm), torch.randn(2, 1, 4, 4), layers=1, channels=1)
    x = torch.linspace(-20, 20, 20_001)
    density = mixture_density(layer, 0, x)
    torch.testing.assert_close(torch.trapezoid(density, x, dim=1), layer.prior[:, 0], rtol=1e-4, atol=1e-5)
    mean = torch.trapezoid(density * x, x, dim=1) / layer.prior[:, 0]
    torch.testing.assert_close(mean, norm.running_mean[:, 0], rtol=1e-3, atol=1e-3)


def test_class_accuracies_shows_every_class():
    counts = torch.tensor([500, 101, 100, 19])
    figure = class_accuracies(["a", "b", "c", "d"], counts, [0.9, 0.8, 0.7, 0.1])
    points = {c.get_label(): c.get_offsets().tolist() for c in figure.axes[0].collections}
    assert points == {"many": [[500, 0.9], [101, 0.8]], "medium": [[100, 0.7]], "few": [[19, 0.1]]}


def test_learning_curves_shows_the_terms_there_are():
    record = {"loss": 1.0, "first": 1.0, "accuracy": 0.5, "validation": 0.4}
    single = [{"epoch": e, **record} for e in (1, 2)]
    dual = [{**r, "second": 2.0, "consistency": -1.0} for r in single]
    for history, count in ((single, 1), (dual, 4)):
        losses = learning_curves(history, 2).axes[0]
        assert len(losses.lines) == count
        assert losses.lines[0].get_xdata().tolist() == [1, 2]


@pytest.mark.parametrize("num_classes", [4, 100])
def test_confusion_plot_colours_by_row(num_classes):
    confusion = torch.diag(torch.arange(1, num_classes + 1))
    confusion[0, 1] = 3
    (axes, _) = confusion_plot([f"class {k}" for k in range(num_classes)], confusion).axes
    fractions = torch.as_tensor(axes.images[0].get_array())
    assert (fractions[0, 0], fractions[0, 1], fractions[1, 1]) == (0.25, 0.75, 1)
    assert len(axes.texts) == (num_classes + 1 if num_classes == 4 else 0)


def test_page_escapes_names_and_holds_pictures():
    classes = ["<b>", "&", "c"]
    counts, confusion = torch.tensor([200, 50, 5]), torch.tensor([[9, 1, 0], [0, 9, 1], [5, 0, 5]])
    images = Labelled(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    data = Data("<i>", classes, counts, images, images, images, Views(nn.Identity(), nn.Identity()))
    model = ResNetCifar(20, 3, 1, CompoundBatchNorm2d)
    history = [{"epoch": 1, "loss": 1.0, "first": 1.0, "accuracy": 0.5, "validation": 0.4}]
    figures = summarize(confusion, counts, classes)
    final = {"last": {"epoch": 1, **figures}, "best": {"epoch": 1, **figures}}
    features = layer_features(model, torch.randn(4, 1, 8, 8))
    page = report_page(Config(), data, history, final, confusion, features)
    assert "<i>" not in page and "&lt;i&gt;" in page
    assert "<td>76.7%</td>" in page and "50.0% (class c)" in page
    assert "<th>few (&lt; 20)</th>" in page
    pictures = re.findall(r"base64,([^\"]+)", page)
    assert len(pictures) == 4
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        image.load()
        assert image.width > 500
