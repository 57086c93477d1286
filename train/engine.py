"""The training loop: epochs, evaluation, checkpoints, resuming."""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from cbn_ext import CompoundBatchNorm2d, class_groups
from train.config import Config, OptimizerConfig
from train.data import Data
from train.data.labelled import Labelled
from train.data.loaders import AugmentedImages, EpochBatches, training_loader
from train.dual_path import dual_path_loss
from train.errors import UserError
from train.losses import balanced_softmax
from train.metrics import balanced_accuracy, confusion_matrix, summarize
from train.models.resnet_cifar import ResNetCifar
from train.run_folder import RunFolder

EVALUATION_BATCH = 256


def build_model(config: Config, num_classes: int, in_channels: int) -> nn.Module:
    """The network of a configuration; its initial weights are a function of ``config.seed``."""
    norm = nn.BatchNorm2d
    if config.norm == "compound":
        norm = partial(CompoundBatchNorm2d, **asdict(config.compound))
    torch.manual_seed(config.seed)
    return ResNetCifar(config.depth, num_classes, in_channels, norm)


def choose_device(name: str) -> torch.device:
    """The device called "auto", "cpu" or "cuda".

    Raises:
        UserError: cuda where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def learning_rate(config: OptimizerConfig, step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then half a cosine towards 0.

    A function of the step alone, so that there is no state of a schedule to restore.
    """
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


class Trainer:
    """A network, its optimiser and the data, on a device.

    Args:
        config: resolved configuration.
        data: the images.
        folder: where the run is kept.

    Raises:
        UserError: no such device, or a number of components that the layers or the classes do not allow.
    """

    def __init__(self, config: Config, data: Data, folder: RunFolder) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.device = choose_device(config.device)
        num_classes = len(data.classes)
        try:
            self.model = build_model(config, num_classes, data.train.images.shape[1]).to(self.device)
            self.groups = None
            if config.split:
                self.groups = class_groups(num_classes, config.compound.num_components).to(self.device)
        except ValueError as error:
            raise UserError(f"compound.num_components: {error}") from error
        # The prior of the loss is that of the images that train.
        self.counts = torch.bincount(data.train.labels, minlength=num_classes).to(self.device)

        sgd = config.optimizer
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, sgd.lr, sgd.momentum, weight_decay=sgd.weight_decay)

        views = [data.views.strong] if config.paths == "single" else [data.views.strong, data.views.weak]
        images = AugmentedImages(data.train, views, config.seed)
        self.batches = EpochBatches(len(data.train.labels), config.batch_size, config.seed)
        self.loader = training_loader(images, self.batches, config.data.workers, self.device.type == "cuda")

        mean, std = data.train.channel_statistics()
        self.mean, self.std = (s.view(1, -1, 1, 1).to(self.device) for s in (mean, std))
        self.history: list[dict[str, Any]] = []

    def normalize(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 as float32 on the device; the training set gets mean 0, variance 1."""
        return (images.to(self.device, non_blocking=True).float() / 255 - self.mean) / self.std

    def loss(self, views: list[Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One step's terms, ``loss`` being their weighted sum, and the first path's logits (N, K).

        Args:
            views: the strong view and, with two paths, the weak one: (N, C, H, W) float32.
            labels: (N,).
        """
        weights = self.config.loss
        if self.config.paths == "single":
            logits = self.model(views[0])
            first = balanced_softmax(logits, labels, self.counts)
            return {"loss": weights.first * first, "first": first}, logits
        groups = None if self.groups is None else self.groups[labels]
        terms = dual_path_loss(self.model, *views, labels, self.counts, groups, weights)
        named = {
            "loss": terms.total,
            "first": terms.first,
            "second": terms.second,
            "consistency": terms.consistency,
        }
        return named, terms.logits

    def train_epoch(self, epoch: int, advance: Callable[[], None]) -> dict[str, Any]:
        """One pass over the training images.

        Args:
            epoch: from 0.
            advance: called after each step.

        Returns:
            The means of the terms and the accuracy on the strong views, by name.

        Raises:
            UserError: the loss is not finite.
        """
        config, steps = self.config, len(self.batches)
        sums: dict[str, Tensor] = {}
        self.model.train()
        self.batches.epoch = epoch
        for step, (*views, labels) in enumerate(self.loader, start=epoch * steps):
            lr = learning_rate(config.optimizer, step, config.epochs * steps, config.optimizer.warmup_epochs * steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            labels = labels.to(self.device, non_blocking=True)
            terms, logits = self.loss([self.normalize(view) for view in views], labels)
            self.optimizer.zero_grad()
            terms["loss"].backward()
            self.optimizer.step()
            terms["accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() * len(labels)
            advance()
        means = {name: float(total) / len(self.data.train.labels) for name, total in sums.items()}
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is {means['loss']} in epoch {epoch + 1}; try a lower optimizer.lr")
        return {"lr": lr, **means}

    @torch.no_grad()
    def evaluate(self, images: Labelled) -> Tensor:
        """Confusion matrix (K, K) of the network, in evaluation mode, on unaugmented images."""
        self.model.eval()
        batches = images.images.split(EVALUATION_BATCH)
        predictions = torch.cat([self.model(self.normalize(batch)).argmax(dim=1).cpu() for batch in batches])
        return confusion_matrix(images.labels, predictions, len(self.data.classes))

    def fit(self, console: Console) -> None:
        """Train from where the run stands to its last epoch.

        Raises:
            UserError: a loss that is not finite, a checkpoint that cannot be written.
        """
        epochs, steps = self.config.epochs, len(self.batches)
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TextColumn("{task.fields[status]}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            done = len(self.history)
            task = progress.add_task("", total=epochs * steps, completed=done * steps, epoch=done, status="")
            for epoch in range(done, epochs):
                progress.update(task, epoch=f"{epoch + 1}/{epochs}")
                start = time.monotonic()
                record = {"epoch": epoch + 1, **self.train_epoch(epoch, lambda: progress.advance(task))}
                record["validation"] = balanced_accuracy(self.evaluate(self.data.validation))
                record["seconds"] = round(time.monotonic() - start, 3)
                self.history.append(record)
                self.save()
                status = f"loss {record['loss']:.3f}  validation {record['validation']:.1%}"
                progress.update(task, status=status)
                if not console.is_terminal:  # where no bar moves, lines do
                    console.print(f"epoch {epoch + 1}/{epochs}  {status}")

    def best_epoch(self) -> int:
        """The epoch, from 1, of the highest validation accuracy; the later one of two that are equal."""
        return max(self.history, key=lambda record: (record["validation"], record["epoch"]))["epoch"]

    def save(self) -> None:
        """Write the checkpoints and metrics of the epoch that has just ended.

        Killed between any two of the files, the run is resumed from the last checkpoint and writes the others
        again.
        """
        state = {
            "config": asdict(self.config),
            "classes": self.data.classes,
            "counts": self.counts.tolist(),
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "history": self.history,
            "model": self.model.state_dict(),
        }
        if self.best_epoch() == len(self.history):
            self.folder.save(self.folder.best, state)
        self.folder.save(self.folder.last, {**state, "optimizer": self.optimizer.state_dict()})
        self.folder.write_metrics(self.history)

    def resume(self) -> None:
        """Go back to the last checkpoint, or to the start where the run was killed before its first one.

        Raises:
            UserError: the checkpoint is damaged, or of another configuration or other images.
        """
        if not self.folder.last.exists():
            return
        state = self.folder.load(self.folder.last, self.config)
        if (state["classes"], state["counts"]) != (self.data.classes, self.counts.tolist()):
            raise UserError(f"{self.folder.last} was trained on other images: their classes or numbers have changed")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]

    def test(self) -> tuple[dict[str, Any], Tensor]:
        """Evaluate the last and the best checkpoint on the test set, for the only time in the run.

        Returns:
            The final record of metrics.jsonl, and the last checkpoint's confusion matrix (K, K).
        """
        data = self.data
        confusion = self.evaluate(data.test)
        last = deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.folder.load(self.folder.best, self.config)["model"])
        best = self.evaluate(data.test)
        self.model.load_state_dict(last)
        final = {
            "final": True,
            "last": {"epoch": len(self.history), **summarize(confusion, data.counts, data.classes)},
            "best": {"epoch": self.best_epoch(), **summarize(best, data.counts, data.classes)},
        }
        self.folder.write_metrics([*self.history, final])
        return final, confusion
