"""A run's page: one HTML file that needs nothing else, its plots inside it."""

import base64
import html
import io
from dataclasses import asdict
from typing import Any

import yaml
from matplotlib.figure import Figure
from torch import Tensor

from train.config import Config
from train.data import Data
from train.metrics import result_rows
from train.plots import LayerFeatures, class_accuracies, confusion_plot, feature_histograms, learning_curves

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ margin: 0; background: #f4f6f8; color: #22303c; font: 15px/1.5 system-ui, sans-serif; }}
  main {{ max-width: 62rem; margin: 0 auto; padding: 2rem 1rem; }}
  h1 {{ margin: 0; font-size: 1.7rem; }}
  h2 {{ margin: 0; font-size: 1.15rem; }}
  p {{ margin: .2rem 0 .8rem; color: #5b6b79; }}
  section {{ background: white; border-radius: 10px; padding: 1.2rem 1.4rem; margin-top: 1.2rem;
             box-shadow: 0 1px 3px #22303c22; }}
  img {{ display: block; max-width: 100%; margin: 0 auto; }}
  table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e3e8ec; }}
  th:first-child {{ text-align: left; font-weight: 600; }}
  tr:last-child > * {{ border-bottom: 0; }}
  pre {{ overflow-x: auto; font-size: 13px; margin: .6rem 0 0; }}
  summary {{ cursor: pointer; font-weight: 600; }}
</style>
<main>
<h1>{title}</h1>
<p>{subtitle}</p>
{sections}
<section><details><summary>Configuration</summary><pre>{config}</pre></details></section>
</main>
</html>
"""


def report_page(
    config: Config,
    data: Data,
    history: list[dict[str, Any]],
    final: dict[str, Any],
    confusion: Tensor,
    features: list[LayerFeatures],
) -> str:
    """The page as HTML.

    Args:
        config: resolved configuration.
        data: the images.
        history: the records of the epochs.
        final: the test figures of the last and of the best checkpoint.
        confusion: (K, K), test images by true and predicted class, last checkpoint.
        features: what goes into a few channels.
    """
    classes, counts = data.classes, data.counts
    sections = [
        _section("Test accuracy", "The test set is looked at once, when the training has ended.", _table(final)),
        _section(
            "Learning curves",
            "The validation images are taken out of the training set.",
            _image(learning_curves(history, final["best"]["epoch"])),
        ),
        _section(
            "Accuracy of each class against its training images",
            "Test set, last epoch.",
            _image(class_accuracies(classes, counts, final["last"]["per_class"])),
        ),
        _section(
            "Confusion matrix",
            "Test set, last epoch: number of images, coloured by their fraction of the true class.",
            _image(confusion_plot(classes, confusion)),
        ),
        _section(
            "Features and the Gaussians of their mixture",
            "What goes into the first, the middle and the last normalization layer on training images, "
            "for evenly spaced channels: the histogram, the layer's running Gaussians π N(μ, σ²) and, "
            "in black, their sum.",
            _image(feature_histograms(features)),
        ),
    ]
    return PAGE.format(
        title=html.escape(
            f"{data.name}, {config.norm} normalization, {config.paths} path{'s' * (config.paths == 'dual')}"
        ),
        subtitle=html.escape(
            f"ResNet-{config.depth}, {config.epochs} epochs, {int(counts.sum())} training images of "
            f"{len(classes)} classes, {int(counts.max())} to {int(counts.min())} a class"
        ),
        sections="\n".join(sections),
        config=html.escape(yaml.safe_dump(asdict(config), sort_keys=False)),
    )


def _table(final: dict[str, Any]) -> str:
    """Test accuracies of the last and of the best checkpoint as an HTML table."""
    best = final["best"]["epoch"]
    header = f"<tr><th></th><th>last epoch</th><th>best on validation (epoch {best})</th></tr>"
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in result_rows(final)
    )
    return f"<table>{header}{body}</table>"


def _section(heading: str, caption: str, content: str) -> str:
    return f"<section><h2>{heading}</h2><p>{caption}</p>{content}</section>"


def _image(figure: Figure) -> str:
    """The figure as an HTML image that carries its PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
