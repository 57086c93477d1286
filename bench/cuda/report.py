"""What the CUDA benchmark leaves: targets, tables and pictures, of which every row is in the CSV files too."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import cbn_ext
from bench.cases import OPERATIONS, shape_label
from bench.cuda import measure, plan, sweep
from bench.cuda.measure import CudaRow, KernelRow, Measured
from bench.cuda.tables import (
    DTYPES,
    Times,
    cifar_table,
    component_table,
    eager_table,
    kernel_table,
    mean_table,
    memory_table,
    pass_table,
    shape_table,
    targets,
    worst_table,
)
from bench.cuda.timer import Timer
from bench.harness import MemoryRow
from bench.providers import BATCHNORM, COMPILED, OURS
from bench.report import Environment, Report, Table, read_csv, read_environment, report_name, target_table, write_csvs


def run(seconds: float, folder: Path, swept: bool = False) -> int:
    """Measure, or sweep over settings, show and write; the exit status: 1 where anything of ours failed or was wrong.

    What was found is written after every comparison, should the process end before its time.

    Raises:
        SystemExit: there is no GPU, or no CUDA library.
    """
    if not torch.cuda.is_available():
        sys.exit("expected a GPU for the CUDA benchmark; torch finds none")
    if error := cbn_ext.build_info()["cuda_load_error"]:
        sys.exit(f"expected the CUDA library of cbn_ext: {error}")
    timer = Timer()
    environment = timer.environment()
    name = report_name("cuda", environment["device"])
    csv = sweep.csv_of if swept else csv_of

    def save(found: Measured) -> None:
        write_csvs(folder, name, csv(found), environment)

    folder.mkdir(parents=True, exist_ok=True)
    for ending in csv(Measured()):  # those of an older run would pass for this one's
        (folder / f"{name}{ending}.csv").unlink(missing_ok=True)
    comparisons = plan.sweep() if swept else plan.comparisons()
    found = measure.run(timer, environment["copy_gb_per_s"], comparisons, seconds, save)
    report = make_report(environment, found, swept)
    report.show(count=4)  # the others are too wide for a terminal
    report.write(folder)
    return int(found.broken)


def csv_of(found: Measured) -> dict[str, Sequence[Any]]:
    """The rows of every CSV file, by what its name ends with."""
    return {"": found.times, "-memory": found.memory, "-kernels": found.kernels}


def summary(folder: Path) -> list[str]:
    """Targets, worst cases and eager steps in at most 60 lines, from the CSV files of the last run; none: no lines.

    The files are those of a finished run, or of one that was killed.
    """
    endings = tuple(f"{ending}.csv" for ending in (*csv_of(Measured()), "-sweep") if ending)
    paths = [path for path in folder.glob("cuda-*.csv") if not path.name.endswith(endings)]
    if not paths:
        return []
    path = max(paths, key=lambda path: path.stat().st_mtime)

    def rows(ending: str, row_type: type) -> list[Any]:
        other = path.with_name(f"{path.stem}{ending}.csv")
        return read_csv(other, row_type) if other.exists() else []

    environment = read_environment(path, CudaRow)
    found = Measured(rows("", CudaRow), rows("-memory", MemoryRow), rows("-kernels", KernelRow))
    tables = _summary_tables(environment, found)
    return [_facts(environment), *(line for table in reversed(tables) for line in ("", *table.text().splitlines()))]


def _facts(e: Environment) -> str:
    return (
        f"{e['device']}, driver {e['driver']}; CUDA {e['cuda']}, cuDNN {e['cudnn']}, torch {e['torch']}, "
        f"cbn_ext {e['cbn_ext']}; {e['date']}. A copy on the device moves {float(e['copy_gb_per_s']):,.0f} GB/s."
    )


def _summary_tables(e: Environment, found: Measured) -> list[Table]:
    return [
        target_table(
            "Targets (M=4; geometric means over the shapes, of dtypes and layouts the worst)",
            targets(found.times, found.memory, found.kernels, float(e["copy_gb_per_s"])),
        ),
        worst_table(found.times),
        eager_table(found.times),
    ]


def make_report(e: Environment, found: Measured, swept: bool = False) -> Report:
    """Everything that was found out, by the benchmark or by the sweep over settings."""
    return Report(
        kind="cuda",
        environment=e,
        facts=f"{_facts(e)} Measured in {found.seconds:.0f} s.",
        csv=sweep.csv_of(found) if swept else csv_of(found),
        tables=sweep.tables(found) if swept else _tables(e, found),
        text=sweep.HOW if swept else _HOW,
        pictures={} if swept else _pictures(e, found),
        warnings=found.warnings,
        part="-sweep" if swept else "",
    )


def _tables(e: Environment, found: Measured) -> list[Table]:
    times = Times(found.times)
    return [
        *_summary_tables(e, found),
        mean_table(times),
        shape_table(times),
        pass_table(times, found.kernels, e["copy_gb_per_s"]),
        cifar_table(found.times),
        component_table(times),
        memory_table(found.memory),
        kernel_table(times, [shape_label(shape) for shape in plan.SHAPES[:2]]),
    ]


def _pictures(e: Environment, found: Measured) -> dict[str, tuple[list[CudaRow], str]]:
    drawn = {(OURS + operation, 4) for operation in OPERATIONS}
    drawn |= {(BATCHNORM + operation + COMPILED, 1) for operation in OPERATIONS}
    shown = [row for row in Times(found.times).rows.values() if row.member in drawn and row.ratio_to_batchnorm]
    title = f"{e['device']}; unit: eager nn.BatchNorm2d with the same operations"
    by_dtype = {dtype: [row for row in shown if row.dtype == dtype] for dtype in DTYPES}
    return {f"-{dtype}": (rows, f"{dtype}, {title}") for dtype, rows in by_dtype.items() if rows}


_HOW = """## How this was measured

- Steps are captured in CUDA graphs through the layers themselves (`torch.autograd.grad` for the backward pass), and
  the replays are timed by events behind a kernel that keeps the device waiting until all is queued: no time of the
  host is in them. One process; the providers take turns in rounds, every other round in the reverse order; the first
  replay of a turn is not counted.
- What is compared stands in one comparison, a *phase* (CSV) has one for each input. Ratios are of times from one
  comparison; other figures of layers that several phases measure are those of the first. Phases, in this order:
  *plain* (ours, M=4, and nn.BatchNorm2d), *fused*, *split*, *joint* (M = 4 and 8) and *compiled* in float32 and
  bfloat16; the *reference* at three shapes; *components*, M = 1, 2 and 8, in contiguous tensors; *float16* and *batch
  256* without compiled layers; *saturated* and *constant* data. *evaluation forward* is not measured for compiled
  layers and split ones.
- *joint*: one mixture over the channels of a point.
- *split*: each image is normalised with the component of its group; the groups are random, as large as each other.
- *Eager* steps, small inputs only: many are queued, then the device is waited for once; a step's share of the wall
  clock. That is what the host needs.
- L2 *cold*, where nothing is said: a graph's steps each have input, output and gradients of their own, together at
  least three times the L2 cache; all forwards, then all backwards. *Hot* (CSV): all steps share theirs, each
  backward follows its forward; the backward's time is that of both less that of the forward. Only where all fits
  into the cache.
- Before it was timed, every provider's output, gradients and evaluation output were compared with the float64
  reference, in channels of 8 million elements together, the first and the last among them. With a ReLU the gradient
  is expected to pass where the provider's own output is positive.
- GB/s counts, for every provider, one read and one write of a tensor of the input's size forward, two reads and one
  write backward; with a residual one read more forward and one write more backward. Signs kept for a ReLU are not
  counted. A pass counts what it reads and writes itself. The copy's bandwidth was measured at the start of the run.
- *BatchNorm2d + ReLU* and *+ add + ReLU* are in place, as in torchvision's ResNets. All layers count their batches,
  which costs a kernel a step, and move their running statistics.
- Kernel times and names are the profiler's, over one replay of the cold graphs.
- *mixed* data, where nothing is said: the components share the responsibility for every value; *saturated*:
  each value belongs to one component; *constant*: every other channel is constant.
- Memory is the peak over a step of what was requested from the caching allocator, less output and gradient of the
  input (and of the residual)."""
