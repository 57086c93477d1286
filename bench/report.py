"""What a benchmark leaves: tables, CSV, a Markdown summary and plots, named after the machine."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness import BOTH, DIRECTIONS, MemoryRow, TimeRow, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Target:
    """A measured value, None where nothing was measured, and the limit it is meant to keep, "≤" or "≥"."""

    what: str
    value: float | None
    relation: str
    limit: float

    @property
    def met(self) -> bool:
        """Whether the value keeps the limit."""
        if self.value is None:
            return False
        return self.value <= self.limit if self.relation == "≤" else self.value >= self.limit

    @property
    def cells(self) -> list[str]:
        """The target's row in a table."""
        limit = f"{self.relation} {self.limit:g}"
        if self.value is None:
            return [self.what, "", limit, "not measured"]
        return [self.what, f"{self.value:.2f}", limit, "met" if self.met else "missed"]


@dataclass(frozen=True)
class Table:
    """A table that can be shown in two ways; `sections` are groups of rows."""

    title: str
    header: Sequence[str]
    sections: Sequence[Sequence[Sequence[str]]]

    def markdown(self) -> str:
        """A Markdown table under its title."""
        rows = [
            self.header,
            ["---"] * len(self.header),
            *(row for section in self.sections for row in section),
        ]
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


def time_table(rows: Sequence[TimeRow]) -> Table:
    """The three directions of every provider on every case."""
    header = ("input", "provider", "M", *(f"{d}, µs" for d in DIRECTIONS), "GB/s", "/ BatchNorm2d")
    sections = []
    for label, of_case in groupby(rows, _label):
        by_member = groupby(of_case, lambda row: (row.provider, row.M))
        sections.append([[label, provider, str(m), *_time_cells(list(group))] for (provider, m), group in by_member])
    return Table("Time: median (20th-80th percentile); GB/s and ratio of forward+backward", header, sections)


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """Peak memory of every provider on every case."""
    return Table(
        "Peak memory of one forward+backward, KiB",
        ("input", "provider", "M", "input and output", "allocated beyond", "resident beyond"),
        [
            [[label, row.provider, str(row.M), _kib(row.in_out), _kib(row.beyond), _kib(row.resident)] for row in group]
            for label, group in groupby(rows, _label)
        ],
    )


def report_name(kind: str, device: str) -> str:
    """Kind and model of the machine, as the start of file names."""
    return f"{kind}-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_csvs(folder: Path, name: str, csv: dict[str, Sequence[Any]], environment: Any) -> list[Path]:
    """Write the rows of each ending to NAME and that; of what has no rows there is no file."""
    paths = []
    for ending, rows in csv.items():
        if rows:
            paths.append(folder / f"{name}{ending}.csv")
            write_csv(paths[-1], rows, environment)
    return paths


@dataclass(frozen=True)
class Report:
    """All that a benchmark found out.

    kind: such as "cpu". environment: a dataclass with the device's name, the columns that every row of CSV ends with.
    csv, figures: by what their file names end with. text: Markdown below the tables. warnings: what a reader must know.
    part: what the summary's file name ends with.
    """

    kind: str
    environment: Any
    facts: str
    csv: dict[str, Sequence[Any]]
    tables: list[Table]
    figures: dict[str, "Figure"]
    text: str
    warnings: list[str] = field(default_factory=list)
    part: str = ""

    @property
    def name(self) -> str:
        """The start of file names."""
        return report_name(self.kind, self.environment.device)

    def show(self, count: int | None = None) -> None:
        """Print the first `count` tables, or all of them, the first one, such as the targets, last."""
        for table in reversed(self.tables[:count]):
            print(table.text(), end="\n\n")
        for warning in self.warnings:
            print(warning)

    def write(self, folder: Path) -> list[Path]:
        """Write NAME and ending for every CSV file and figure, and NAME.md, into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = write_csvs(folder, self.name, self.csv, self.environment)
        pictures = [folder / f"{self.name}{ending}.png" for ending in self.figures]
        shown = [f"![times]({path.name})" for path in pictures]
        tables = (table.markdown() for table in self.tables)
        warnings = ["\n".join(f"- {warning}" for warning in self.warnings)] if self.warnings else []
        title = self.name + self.part
        paths.append(folder / f"{title}.md")
        paths[-1].write_text("\n\n".join([f"# {title}", self.facts, *warnings, *tables, self.text, *shown]) + "\n")
        # The pictures take the longest: should the process be stopped, they are missed the least.
        for path, figure in zip(pictures, self.figures.values(), strict=True):
            figure.savefig(path, dpi=150)
        return paths + pictures


def _label(row: TimeRow | MemoryRow) -> str:
    return " ".join([row.shape, row.dtype, row.layout, *([row.data] if row.data != "mixed" else [])])


def _time_cells(rows: list[TimeRow]) -> list[str]:
    by_direction = {row.direction: row for row in rows}
    cells = []
    for direction in DIRECTIONS:
        row = by_direction[direction]
        cells.append(f"{row.median_us:,.0f} ({row.p20_us:,.0f}-{row.p80_us:,.0f})")
    both = by_direction[BOTH]
    return [*cells, f"{both.gb_per_s:.2f}", f"{both.ratio_to_batchnorm:.2f}"]


def _kib(size: int | None) -> str:
    return "" if size is None else f"{size / 1024:,.1f}"
