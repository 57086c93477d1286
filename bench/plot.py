"""The picture of a benchmark: forward+backward of every provider relative to nn.BatchNorm2d."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.harness import BOTH, TimeRow


def plot(rows: Sequence[TimeRow], title: str, path: Path) -> None:
    """A panel for each layout, a group of bars for each shape; whiskers: 20th to 80th percentile."""
    rows = [row for row in rows if row.direction == BOTH and row.data == "mixed"]
    members = list(dict.fromkeys((row.provider, row.M) for row in rows))
    layouts = list(dict.fromkeys(row.layout for row in rows))
    figure = Figure(figsize=(6.5 * len(layouts), 4.5), layout="constrained")
    for layout, axes in zip(layouts, figure.subplots(1, len(layouts), sharey=True, squeeze=False)[0], strict=True):
        shown = [row for row in rows if row.layout == layout]
        shapes = list(dict.fromkeys(row.shape for row in shown))
        width = 0.8 / len(members)
        for number, member in enumerate(members):
            bars = [row for row in shown if (row.provider, row.M) == member]
            if not bars:
                continue
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
            axes.bar_label(
                drawn,
                [f"{height:.1f}" if height < 10 else f"{height:.0f}" for height in heights],
                fontsize=7,
                padding=1,
            )
        axes.axhline(1, color="0.3", linewidth=0.8)
        axes.set(title=layout, yscale="log", xticks=range(len(shapes)), xticklabels=shapes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("time, nn.BatchNorm2d = 1")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(members),
        fontsize=8,
    )
    figure.suptitle(f"forward+backward, {title}")
    figure.savefig(path, dpi=150)
