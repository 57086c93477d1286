"""A whole run: read the images, train, test, report."""

from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from train.config import Config
from train.data import load_data
from train.engine import Trainer
from train.metrics import result_rows
from train.plots import layer_features
from train.report import report_page
from train.run_folder import RunFolder, write_atomically

FEATURE_IMAGES = 256  # images whose features the report's histograms show


def train(config: Config, folder: RunFolder, resume: bool, console: Console) -> dict[str, Any]:
    """Train the network of a configuration and leave everything about it in a folder.

    Nothing is written before all that can be wrong with the configuration and the images has been looked at.

    Args:
        config: resolved configuration.
        folder: where the run is kept.
        resume: go on with the run in `folder` rather than begin one.
        console: where progress and results are shown.

    Returns:
        The final record: test figures of the last and of the best checkpoint.

    Raises:
        UserError: see `load_data`, `Trainer` and `RunFolder`.
    """
    torch.set_num_threads(config.threads)
    data = load_data(config.data)
    trainer = Trainer(config, data, folder)
    if resume:
        trainer.resume()
    else:
        folder.create(config)

    _describe(trainer, console)
    trainer.fit(console)
    final, confusion = trainer.test()
    # Images of every class: those of an image folder are sorted by class.
    some = data.train.images[:: -(-len(data.train.images) // FEATURE_IMAGES)]
    features = layer_features(trainer.model, trainer.normalize(some))
    page = report_page(config, data, trainer.history, final, confusion, features)
    write_atomically(folder.report, page.encode())
    console.print(_table(final))
    console.print(f"report: {folder.report}", markup=False, soft_wrap=True)
    return final


def _describe(trainer: Trainer, console: Console) -> None:
    config, data, counts = trainer.config, trainer.data, trainer.data.counts
    say = partial(console.print, markup=False, soft_wrap=True)  # names may hold brackets; paths are to be copied
    say(
        f"{data.name}: {int(counts.sum())} training images of {len(data.classes)} classes, "
        f"{int(counts.max())} to {int(counts.min())} a class; {len(data.validation.labels)} of them "
        f"validate; {len(data.test.labels)} test images"
    )
    norm = "batch normalization"
    if config.norm == "compound":
        norm = f"compound batch normalization (M={config.compound.num_components})"
    parameters = sum(p.numel() for p in trainer.model.parameters())
    paths = {"single": "one path", "dual": "two paths"}[config.paths] + (", one of them split" if config.split else "")
    say(f"ResNet-{config.depth} with {norm}, {parameters / 1e6:.2f} M parameters; {paths}; on {trainer.device}")
    say(f"run in {trainer.folder.path}")
    if trainer.history:
        say(f"resumed after epoch {len(trainer.history)}")


def _table(final: dict[str, Any]) -> Table:
    table = Table(title="test accuracy")
    table.add_column()
    table.add_column("last epoch", justify="right")
    table.add_column(f"best on validation (epoch {final['best']['epoch']})", justify="right")
    for row in result_rows(final):
        table.add_row(*row)
    return table
