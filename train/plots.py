"""The plots of a run's page."""

from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from cbn_ext import CompoundBatchNorm2d
from train.metrics import shot_groups

INK, GRID = "#22303c", "#e3e8ec"
PALETTE = ("#3b6fb6", "#d9822b", "#3a9d6e", "#a85fa8", "#c0504d", "#6b7d8c", "#b8a12f", "#4aa5b5")
GROUP_COLOURS = {"many": PALETTE[0], "medium": PALETTE[1], "few": PALETTE[4]}
EPS = 1e-5  # of the layers
LABELLED_CLASSES = 20  # with more, names and numbers in the plots would cover each other


class LayerFeatures(NamedTuple):
    """What goes into a few channels of a normalization layer, and the mixture it holds for them.

    Attributes:
        layer: the layer's name.
        channels: c channel numbers.
        values: (c, P), the features.
        prior, mean, var: (M, c), the layer's running statistics; M = 1 for batch normalization.
    """

    layer: str
    channels: list[int]
    values: Tensor
    prior: Tensor
    mean: Tensor
    var: Tensor


@torch.no_grad()
def layer_features(model: nn.Module, images: Tensor, layers: int = 3, channels: int = 3) -> list[LayerFeatures]:
    """Features of evenly spaced channels of evenly spaced normalization layers, the first and the last among
    them.

    Args:
        model: is put in evaluation mode.
        images: normalised images, (N, C, H, W).
        layers: how many layers.
        channels: how many channels of each.
    """
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, CompoundBatchNorm2d | nn.BatchNorm2d)]
    chosen = [norms[i] for i in torch.linspace(0, len(norms) - 1, layers).round().int()]
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, module in chosen
    ]
    model.eval()
    model(images)
    for hook in hooks:
        hook.remove()
    features = []
    for name, norm in chosen:
        index = torch.linspace(0, norm.num_features - 1, channels).round().int()
        # (C,) for batch normalization, a mixture of one; the prior is (M,) in joint mode.
        mean, var = (s.view(-1, norm.num_features)[:, index] for s in (norm.running_mean, norm.running_var))
        prior = getattr(norm, "running_prior", mean.new_ones(1))
        prior = prior[:, index] if prior.dim() == 2 else prior[:, None].expand_as(mean)
        values = inputs[name][:, index].transpose(0, 1).flatten(1)
        features.append(LayerFeatures(name, index.tolist(), *(t.cpu() for t in (values, prior, mean, var))))
    return features


def learning_curves(history: list[dict[str, Any]], best_epoch: int) -> Figure:
    """Terms of the loss, and accuracies, by epoch."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]
    named = {"loss": "sum", "first": "first path", "second": "second path", "consistency": "consistency"}
    # With one path the sum is its only term.
    terms = [name for name in named if name in history[0] and (name != "loss" or "second" in history[0])]
    for name, colour in zip(terms, (INK, *PALETTE), strict=False):
        losses.plot(epochs, [record[name] for record in history], color=colour, label=named[name])
    losses.set(xlabel="epoch", ylabel="loss")
    accuracies.plot(epochs, [r["accuracy"] for r in history], color=PALETTE[0], label="training, strong views")
    accuracies.plot(epochs, [r["validation"] for r in history], color=PALETTE[1], label="validation, mean of classes")
    accuracies.axvline(best_epoch, color=INK, linestyle=":", label="best on validation")
    accuracies.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(axes)
        axes.legend(frameon=False, fontsize=8)
    return figure


def class_accuracies(classes: list[str], counts: Tensor, per_class: list[float]) -> Figure:
    """A point for each class: test accuracy over training images."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots()
    images, accuracy = counts.numpy(), np.array(per_class)
    for name, group in shot_groups(counts).items():
        if group.any():
            x, y = images[group.numpy()], accuracy[group.numpy()]
            axes.scatter(x, y, s=60, color=GROUP_COLOURS[name], label=name, zorder=3)
    if len(classes) <= LABELLED_CLASSES:
        for name, count, value in zip(classes, counts.tolist(), per_class, strict=True):
            axes.annotate(name, (count, value), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy", ylim=(-0.03, 1.1))
    _tidy(axes)
    figure.legend(frameon=False, loc="outside right upper")
    return figure


def confusion_plot(classes: list[str], confusion: Tensor) -> Figure:
    """The confusion matrix, rows scaled to 1."""
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    axes = figure.subplots()
    fractions = confusion.double() / confusion.sum(dim=1, keepdim=True)
    image = axes.imshow(fractions.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= LABELLED_CLASSES:
        slant = {"rotation": 45, "ha": "right"} if max(map(len, classes)) > 2 else {}
        axes.set_xticks(range(len(classes)), classes, fontsize=9, **slant)
        axes.set_yticks(range(len(classes)), classes, fontsize=9)
        for i, j in confusion.nonzero().tolist():
            colour = "white" if fractions[i, j] > 0.5 else INK
            axes.text(j, i, int(confusion[i, j]), ha="center", va="center", color=colour, fontsize=8)
    return figure


def mixture_density(layer: LayerFeatures, channel: int, x: Tensor) -> Tensor:
    """π N(x; μ, σ²) of every component: x (G,) -> (M, G), for the channel of that position in `layer`."""
    prior, mean, var = (statistic[:, channel, None] for statistic in (layer.prior, layer.mean, layer.var))
    return prior * torch.distributions.Normal(mean, (var + EPS).sqrt()).log_prob(x).exp()


def feature_histograms(features: list[LayerFeatures]) -> Figure:
    """A row for each layer, a panel for each channel: the features' histogram and the M Gaussians over it."""
    figure = Figure(figsize=(10, 2.7 * len(features)), layout="constrained")
    panels = figure.subplots(len(features), len(features[0].channels), squeeze=False)
    for row, layer in zip(panels, features, strict=True):
        for i, (axes, channel) in enumerate(zip(row, layer.channels, strict=True)):
            low, high = layer.values[i].quantile(torch.tensor([0.001, 0.999])).tolist()
            margin = 0.1 * (high - low) + EPS
            limits = (low - margin, high + margin)
            bars, *_ = axes.hist(layer.values[i].numpy(), bins=80, range=limits, density=True, color="#ccd6de")
            x = torch.linspace(*limits, 400)
            density = mixture_density(layer, i, x)
            for m, curve in enumerate(density):
                axes.plot(x.numpy(), curve.numpy(), color=PALETTE[m % len(PALETTE)], linewidth=1.5)
            mixture = density.sum(dim=0)
            if len(density) > 1:
                axes.plot(x.numpy(), mixture.numpy(), color="black", linewidth=0.8)
            # A value that many pixels share, as an image's black border has, must not flatten the Gaussians.
            axes.set_ylim(0, 1.05 * min(bars.max(), 3 * float(mixture.max())))
            axes.set_title(f"{layer.layer}, channel {channel}", fontsize=9)
            axes.set_yticks([])
            _tidy(axes)
    return figure


def _tidy(axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
