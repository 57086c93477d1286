"""What a benchmark leaves: tables, CSV, a Markdown summary and pictures, named after the machine."""

import csv
import importlib.util
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from bench.harness import BOTH, TimeRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What every row of CSV ends with, column to value, of which the device's name is one.
Environment = Mapping[str, Any]
AnyRow = TypeVar("AnyRow")


def versions(*modules: ModuleType) -> dict[str, str]:
    """The columns of an environment that say what was measured, and when."""
    return {module.__name__: module.__version__ for module in modules} | {"date": date.today().isoformat()}


@dataclass(frozen=True)
class Target:
    """A measured value, None where nothing was measured, and the limit it is meant to keep, "≤" or "≥"."""

    what: str
    value: float | None
    relation: str
    limit: float

    @property
    def met(self) -> bool:
        """The value was measured and keeps the limit."""
        keeps = {"≤": operator.le, "≥": operator.ge}[self.relation]
        return self.value is not None and keeps(self.value, self.limit)

    @property
    def cells(self) -> list[str]:
        """The target's row in a table."""
        verdict = "not measured" if self.value is None else "met" if self.met else "missed"
        return [self.what, number(self.value), f"{self.relation} {self.limit:g}", verdict]


@dataclass(frozen=True)
class Table:
    """A table that can be shown in two ways; `sections` are groups of rows."""

    title: str
    header: Sequence[str]
    sections: Sequence[Sequence[Sequence[str]]]

    def markdown(self) -> str:
        """A Markdown table under its title."""
        rows = [self.header, ["---"] * len(self.header), *(row for section in self.sections for row in section)]
        return "\n".join([f"## {self.title}", "", *("| " + " | ".join(row) + " |" for row in rows)])

    def text(self) -> str:
        """The table for the terminal, columns aligned."""
        rows = [self.header, *(row for section in self.sections for row in section)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([self.title, "-" * len(self.title), *(line.rstrip() for line in lines)])


def target_table(title: str, targets: Sequence[Target]) -> Table:
    """What is to be reached beside what is."""
    return Table(title, ("what", "measured", "target", ""), [[target.cells for target in targets]])


def number(value: float | None, digits: int = 2) -> str:
    """A cell, empty for what was not measured."""
    return "" if value is None else f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Report:
    """All that a benchmark found out.

    kind: such as "cpu". csv: rows by what their file's name ends with; pictures: likewise, the rows and the title of
    each. text: Markdown below the tables. warnings: what a reader must know. part: what the summary's file name ends
    with.
    """

    kind: str
    environment: Environment
    facts: str
    csv: dict[str, Sequence[Any]]
    tables: list[Table]
    text: str
    pictures: dict[str, tuple[Sequence[TimeRow], str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    part: str = ""

    def __post_init__(self) -> None:
        if self.pictures and not importlib.util.find_spec("matplotlib"):
            self.pictures.clear()
            self.warnings.append("No pictures: matplotlib is not installed.")

    def show(self, count: int | None = None) -> None:
        """Print the first `count` tables, or all of them, the first one, such as the targets, last."""
        for table in reversed(self.tables[:count]):
            print(table.text(), end="\n\n")
        for warning in self.warnings:
            print(warning)

    def write(self, folder: Path) -> None:
        """Write NAME and ending for every CSV file and picture, and NAME.md, into `folder`; say so."""
        folder.mkdir(parents=True, exist_ok=True)
        name = report_name(self.kind, self.environment["device"])
        written = write_csvs(folder, name, self.csv, self.environment)
        summary = folder / f"{name}{self.part}.md"
        pictures = {folder / f"{name}{ending}.png": drawn for ending, drawn in self.pictures.items()}
        warnings = ["\n".join(f"- {warning}" for warning in self.warnings)] if self.warnings else []
        tables = (table.markdown() for table in self.tables)
        shown = (f"![times]({path.name})" for path in pictures)
        blocks = [f"# {summary.stem}", self.facts, *warnings, *tables, self.text, *shown]
        summary.write_text("\n\n".join(blocks) + "\n")
        # The pictures take the longest: should the process be stopped, they are missed the least.
        for path, drawn in pictures.items():
            plot(*drawn).savefig(path, dpi=150)
        for path in (*written, summary, *pictures):
            print(f"wrote {path}")


def report_name(kind: str, device: str) -> str:
    """Kind and model of the machine, as the start of file names."""
    return f"{kind}-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_csvs(folder: Path, name: str, csv: dict[str, Sequence[Any]], environment: Environment) -> list[Path]:
    """Write the rows of each ending to NAME and that; of what has no rows there is no file."""
    paths = {folder / f"{name}{ending}.csv": rows for ending, rows in csv.items() if rows}
    for path, rows in paths.items():
        write_csv(path, rows, environment)
    return list(paths)


def write_csv(path: Path, rows: Sequence[Any], environment: Environment) -> None:
    """One line for each row, a dataclass; the environment's columns come last.

    The file is there as a whole or, should the process end meanwhile, as it was before.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(each.name for each in fields(rows[0])), *environment])
        for row in rows:
            rounded = (round(value, 3) if isinstance(value, float) else value for value in vars(row).values())
            writer.writerow([*rounded, *environment.values()])
    part.replace(path)


def read_csv(path: Path, row_type: type[AnyRow]) -> list[AnyRow]:
    """The rows that `write_csv` wrote: of each line the columns that `row_type` has."""
    types = get_type_hints(row_type)
    with path.open(newline="") as file:
        return [
            row_type(**{name: _parse(line[name], kind) for name, kind in types.items()})
            for line in csv.DictReader(file)
        ]


def read_environment(path: Path, row_type: type) -> Environment:
    """The columns behind those of `row_type`, as text, from the first line of a file that `write_csv` wrote."""
    with path.open(newline="") as file:
        return {name: text for name, text in next(csv.DictReader(file)).items() if name not in get_type_hints(row_type)}


def _parse(text: str, kind: Any) -> Any:
    kinds = get_args(kind) or (kind,)
    return None if not text and type(None) in kinds else kinds[0](text)


def plot(rows: Sequence[TimeRow], title: str) -> "Figure":
    """Forward+backward relative to nn.BatchNorm2d; whiskers: 20th to 80th percentile.

    There is a panel for each layout and a group of bars for each shape. Only what stands beside a time of
    nn.BatchNorm2d is drawn. Many shapes get panels one below the other, and a linear scale, for which all must be near
    one.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.direction == BOTH and row.data == "mixed" and row.ratio_to_batchnorm]
    members = list(dict.fromkeys(row.member for row in rows))
    layouts = list(dict.fromkeys(row.layout for row in rows))
    stacked = max((len({row.shape for row in rows if row.layout == layout}) for layout in layouts), default=0) > 6
    across, down = (1, len(layouts)) if stacked else (len(layouts), 1)
    figure = Figure(figsize=((18 if stacked else 6.5) * across, 4.5 * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flat
    for layout, axes in zip(layouts, panels, strict=True):
        shown = [row for row in rows if row.layout == layout]
        shapes = list(dict.fromkeys(row.shape for row in shown))
        width = 0.8 / len(members)
        for index, member in enumerate(members):
            bars = [row for row in shown if row.member == member]
            # The unit is BatchNorm2d's median on the same shape.
            units = [row.median_us / row.ratio_to_batchnorm for row in bars]
            spread = [
                [(row.median_us - row.p20_us) / unit for row, unit in zip(bars, units, strict=True)],
                [(row.p80_us - row.median_us) / unit for row, unit in zip(bars, units, strict=True)],
            ]
            positions = [shapes.index(row.shape) + (index - (len(members) - 1) / 2) * width for row in bars]
            heights = [row.ratio_to_batchnorm for row in bars]
            label = f"{member[0]}, M={member[1]}"
            drawn = axes.bar(positions, heights, width, yerr=spread, label=label, color=f"C{index}", ecolor="0.3")
            texts = [f"{height:.{2 if stacked else 1 if height < 10 else 0}f}" for height in heights]
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
