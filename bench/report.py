"""What a benchmark leaves: tables, CSV, a Markdown summary and a plot, named after the machine."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from bench.harness import BOTH, DIRECTIONS, Environment, MemoryRow, TimeRow, write_csv
from bench.plot import plot


@dataclass(frozen=True)
class Target:
    """A measured value and the limit it is meant to keep; relation is "≤" or "≥"."""

    what: str
    value: float
    relation: str
    limit: float

    @property
    def met(self) -> bool:
        """Whether the value keeps the limit."""
        return self.value <= self.limit if self.relation == "≤" else self.value >= self.limit


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

    def rich(self) -> RichTable:
        """The table for the terminal, a line between sections."""
        table = RichTable(*self.header, title=self.title)
        for section in self.sections:
            for row in section:
                table.add_row(*row, end_section=row is section[-1])
        return table


@dataclass(frozen=True)
class Report:
    """All that was measured on one kind of machine. load: the system's load average before the run."""

    kind: str
    environment: Environment
    load: float
    times: list[TimeRow]
    memory: list[MemoryRow]
    targets: list[Target]

    @property
    def name(self) -> str:
        """Kind and model of the machine, as the start of file names."""
        return f"{self.kind}-" + re.sub(r"[^a-z0-9]+", "-", self.environment.device.lower()).strip("-")

    def tables(self) -> list[Table]:
        """Targets, times and memory."""
        targets = [
            [t.what, f"{t.value:.2f}", f"{t.relation} {t.limit:g}", "met" if t.met else "missed"] for t in self.targets
        ]
        header = ("input", "provider", "M", *(f"{d}, µs" for d in DIRECTIONS), "GB/s", "/ BatchNorm2d")
        times = []
        for label, rows in groupby(self.times, _label):
            by_member = groupby(rows, lambda row: (row.provider, row.M))
            times.append([[label, provider, str(m), *_time_cells(list(group))] for (provider, m), group in by_member])
        memory = [
            [
                [label, row.provider, str(row.M), _kib(row.in_out), _kib(row.beyond), _kib(row.resident)]
                for row in rows
            ]
            for label, rows in groupby(self.memory, _label)
        ]  # fmt: skip
        return [
            Table("Targets (forward+backward)", ("what", "measured", "target", ""), [targets]),
            Table("Time: median (20th-80th percentile); GB/s and ratio of forward+backward", header, times),
            Table(
                "Peak memory of one forward+backward, KiB",
                ("input", "provider", "M", "input and output", "allocated beyond", "resident beyond"),
                memory,
            ),
        ]

    def show(self, console: Console) -> None:
        """Print the tables, the targets last."""
        targets, *measured = self.tables()
        for table in (*measured, targets):
            console.print(table.rich())
        if self.load > 0.5:
            console.print(f"The load average before the run was {self.load:.1f}: other processes disturb these times.")

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.csv, NAME-memory.csv, NAME.png and NAME.md into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        times, memory, picture, summary = paths = [
            folder / (self.name + ending) for ending in (".csv", "-memory.csv", ".png", ".md")
        ]
        write_csv(times, self.times, self.environment)
        write_csv(memory, self.memory, self.environment)
        plot(self.times, self.environment.device, picture)
        e = self.environment
        facts = (
            f"{e.device}, {e.isa}, {e.threads} threads; torch {e.torch}, cbn_ext {e.cbn_ext}; {e.date}; "
            f"load average before the run {self.load:.1f}."
        )
        text = [
            f"# {self.name}",
            facts,
            *(table.markdown() for table in self.tables()),
            _HOW,
            f"![times]({picture.name})",
        ]
        summary.write_text("\n\n".join(text) + "\n")
        return paths


_HOW = """## How this was measured

- One process; the providers take turns in rounds, every other round in the reverse order. Training mode; a
  step is the layer's forward and `torch.autograd.grad` for input, weight and bias. The first step of a turn
  is not counted.
- Every provider's output and gradients were compared with the float64 reference before it was timed.
- GB/s counts, for every provider, one read and one write of a tensor of the input's size forward, two reads
  and one write backward.
- *reference* is the formula in plain PyTorch operations with autograd, `cbn_ext.reference.forward`.
- *mixed* data, where nothing is said: the components share the responsibility for every value; *saturated*:
  each value belongs to one component; *constant*: every other channel is constant.
- *Input and output* are x, y and their gradients. *Allocated beyond* is the peak, over one step, of what
  PyTorch's allocator handed out besides these: statistics, gradients of the parameters, temporaries.
  *Resident beyond* is the peak of the process's touched memory besides these, in whole pages; it also sees
  what C++ code takes elsewhere, and freed temporaries that have not gone back to the system.
- The eager backward of `nn.BatchNorm2d` (torch 2.11) allocates the input's gradient twice and leaves one
  untouched: it is among the allocated bytes, not among the resident ones. Without it, statistics of each
  channel remain, of which M components have M times as many: compare the rows of the memory table, not the
  ratio alone."""


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
