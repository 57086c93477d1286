"""The configuration of a training run: one dataclass tree, read by jsonargparse.

The defaults are the default run: the handwritten digits, no download. Everything else is an override, in a
YAML file (``--config``) or on the command line.
"""

import json
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt

from train.errors import UserError


@dataclass
class CompoundConfig:
    """The compound layers; without effect when norm is batch.

    Args:
        num_components: Gaussians in every layer's mixture, M.
        responsibility: One mixture per channel, or one of whole feature vectors.
        detach_responsibility: Treat the responsibilities as constants in the backward pass.
        affine_init: Start of the affine parameters. Not given: "unit" where the split path is used, because
            the preserving start would hand each class group an offset of its own; otherwise the default of
            the mode.
    """

    num_components: PositiveInt = 4
    responsibility: Literal["channel", "joint"] = "channel"
    detach_responsibility: bool = False
    affine_init: Literal["preserve", "unit"] | None = None


@dataclass
class DataConfig:
    """The images.

    Args:
        root: Folder with train/<class>/ and test/<class>/ of images. Not given: scikit-learn's handwritten
            digits.
        ratio: Images of the first class over images of the last one in the long-tailed training set.
        seed: Seed of the draw: which images are kept, which validate and, of the digits, which test.
        max_per_class: Upper bound of the images kept of a class.
        validation: Fraction of each class's training images that chooses the best checkpoint.
        image_size: Side to which images are scaled and centre-cropped. Not given: they must all have one
            size.
        memory_gib: Upper bound of the decoded images, which stay in memory.
        workers: Processes that make the augmented views; 0 makes them in the training process.
    """

    root: str | None = None
    ratio: PositiveFloat = 20.0
    seed: NonNegativeInt = 0
    max_per_class: PositiveInt | None = None
    validation: OpenUnitInterval = 0.1
    image_size: PositiveInt | None = None
    memory_gib: PositiveFloat = 8.0
    workers: NonNegativeInt = 0


@dataclass
class OptimizerConfig:
    """Stochastic gradient descent with a cosine schedule.

    Args:
        lr: Learning rate at its highest.
        momentum: Momentum of the gradient.
        weight_decay: L2 penalty, of all parameters.
        warmup_epochs: Epochs in which the learning rate rises linearly.
    """

    lr: PositiveFloat = 0.05
    momentum: NonNegativeFloat = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    warmup_epochs: NonNegativeInt = 0


@dataclass
class LossConfig:
    """Weight of each term.

    Args:
        first: Balanced softmax of the first path, the only one when paths is single.
        second: Balanced softmax of the second path.
        consistency: Cosine consistency of the two paths.
    """

    first: NonNegativeFloat = 1.0
    second: NonNegativeFloat = 1.0
    consistency: NonNegativeFloat = 1.0


@dataclass
class Config:
    """A training run.

    Args:
        norm: Normalization layers of the network: nn.BatchNorm2d or CompoundBatchNorm2d.
        paths: Learn through one path, from the strong views, or through two, with the weak views and the
            consistency term besides (dual-path learning).
        split: Whether the second path normalises each class group apart. Not given: with norm compound, paths
            dual.
        depth: Layers of the CIFAR ResNet.
        epochs: Passes over the training images.
        batch_size: Images in a step.
        seed: Seed of the initial weights, the order of the images and their augmentation.
        device: Where to train; auto takes the GPU if there is one.
        threads: CPU threads, on whose number the last bits of a run depend. Not given: one for the digits,
            whose batches are too small to be shared out, otherwise torch's choice.
        compound: The compound layers.
        data: The images.
        optimizer: The optimiser.
        loss: Weights of the loss terms.
    """

    norm: Literal["batch", "compound"] = "compound"
    paths: Literal["single", "dual"] = "dual"
    split: bool | None = None
    depth: Literal[20, 32, 44, 56, 110] = 20
    epochs: PositiveInt = 60
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    compound: CompoundConfig = field(default_factory=CompoundConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)


def build_parser() -> ArgumentParser:
    """The parser of ``python -m train``: every field of `Config`, and where the run is kept."""
    parser = ArgumentParser(prog="python -m train", description="Train a network on long-tailed images.")
    parser.add_argument("--config", action="config", help="YAML file of options; later options override it.")
    parser.add_argument("--out", type=str | None, help="Folder of the run; default runs/<name>-<time>.")
    parser.add_argument("--resume", type=str | None, metavar="RUN", help="Folder of a run to go on with.")
    parser.add_class_arguments(Config)
    return parser


def config_of(options: Namespace) -> Config:
    """The `Config` among the parsed options, as it was given."""
    return _build(Config, options.as_dict())


def _build(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass `kind` with the values of the same names."""
    arguments = {}
    for f in fields(kind):
        value = values[f.name]
        # Through JSON, because the parser's restricted numbers are subclasses of int and float, which safe
        # YAML files and safe checkpoints refuse.
        arguments[f.name] = _build(f.type, value) if is_dataclass(f.type) else json.loads(json.dumps(value))
    return kind(**arguments)


def resolve(config: Config) -> Config:
    """`config` with every choice made that depends on others: ``split``, ``threads``, where there is a split
    path ``compound.affine_init``, and an absolute ``data.root``.

    Raises:
        UserError: the split path asked for where there is none; warm-up longer than the training.
    """
    splittable = config.norm == "compound" and config.paths == "dual"
    split = splittable if config.split is None else config.split
    if split and not splittable:
        raise UserError(
            f"split is true, which needs norm compound and paths dual, got norm {config.norm} and paths {config.paths}"
        )
    if config.optimizer.warmup_epochs >= config.epochs:
        raise UserError(
            f"optimizer.warmup_epochs must be less than epochs, "
            f"got {config.optimizer.warmup_epochs} of {config.epochs} epochs"
        )
    compound = config.compound
    if split and compound.affine_init is None:
        compound = replace(compound, affine_init="unit")
    data, threads = config.data, config.threads
    if data.root is not None:
        data = replace(data, root=str(Path(data.root).resolve()))  # a run may be resumed from another folder
    if threads is None:
        threads = 1 if data.root is None else torch.get_num_threads()
    return replace(config, split=split, threads=threads, compound=compound, data=data)


def differing_fields(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted name and both values of every field in which two nested dictionaries differ."""
    differences = []
    for key in first | second:
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            differences += differing_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            differences.append((f"{prefix}{key}", a, b))
    return differences
