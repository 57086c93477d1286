"""The picture of a benchmark: forward+backward of every provider relative to nn.BatchNorm2d."""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.harness import BOTH, TimeRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_plot() -> bool:
    """Whether matplotlib is installed; a benchmark can do without."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(rows: Sequence[TimeRow], title: str) -> "Figure":
    """A panel for each layout, a group of bars for each shape; whiskers: 20th to 80th percentile.

    Only what stands beside a time of nn.BatchNorm2d is drawn. Many shapes get panels one below the other, and a linear
    scale, for which all must be near one.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.direction == BOTH and row.data == "mixed" and row.ratio_to_batchnorm]
    members = list(dict.fromkeys((row.provider, row.M) for row in rows))
    layouts = list(dict.fromkeys(row.layout for row in rows))
    most = max((len({row.shape for row in rows if row.layout == layout}) for layout in layouts), default=0)
    stacked = most > 6
    across, down = (1, len(layouts)) if stacked else (len(layouts), 1)
    figure = Figure(figsize=((18 if stacked else 6.5) * across, 4.5 * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flat
    for layout, axes in zip(layouts, panels, strict=True):
        shown = [row for row in rows if row.layout == layout]
        shapes = list(dict.fromkeys(row.shape for row in shown))
        width = 0.8 / len(members)
        for number, member in enumerate(members):
            bars = [row for row in shown if (row.provider, row.M) == member]
            # The unit is BatchNorm2d's median on the same shape.
            units = [row.median_us / row.ratio_to_batchnorm for row in bars]
            heights = [row.ratio_to_batchnorm for row in bars]
            spread = [
                [(row.median_us - row.p20_us) / unit for row, unit in zip(bars, units, strict=True)],
                [(row.p80_us - row.median_us) / unit for row, unit in zip(bars, units, strict=True)],
            ]
            positions = [shapes.index(row.shape) + (number - (len(members) - 1) / 2) * width for row in bars]
            label = f"{member[0]}, M={member[1]}"
            drawn = axes.bar(positions, heights, width, yerr=spread, label=label, color=f"C{number}", ecolor="0.3")
            texts = [
                f"{height:.2f}" if stacked else f"{height:.1f}" if height < 10 else f"{height:.0f}"
                for height in heights
            ]
            axes.bar_label(drawn, texts, fontsize=7, padding=1, rotation=90 if stacked else 0)
        axes.axhline(1, color="0.3", linewidth=0.8)
        axes.set(title=layout, yscale="linear" if stacked else "log", xticks=range(len(shapes)))
        axes.set_xticklabels(shapes, fontsize=8 if stacked else None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("time, nn.BatchNorm2d = 1")
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=max(1, min(6, len(members))), fontsize=8)
    figure.suptitle(f"forward+backward, {title}")
    return figure
