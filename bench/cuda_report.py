"""What the CUDA benchmark leaves: targets, tables and plots, of which every row is in the CSV files too."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cbn_ext
from bench import cuda, cuda_sweep
from bench.cuda_compare import CudaRow, KernelRow, Measured
from bench.cuda_tables import (
    cifar_table,
    component_table,
    eager_table,
    kernel_table,
    mean_table,
    memory_table,
    pass_table,
    shape_table,
    worst_table,
)
from bench.cuda_targets import DTYPES, Times, targets
from bench.graphs import Environment, Timer
from bench.harness import MemoryRow, read_csv
from bench.plot import can_plot, plot
from bench.providers import OURS, OURS_ADD_RELU, OURS_RELU, PROVIDERS, shape_label
from bench.report import Report, Table, report_name, target_table, write_csvs


def run(seconds: float, folder: Path, sweep: bool = False) -> int:
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
    name = report_name("cuda", environment.device)
    if sweep:
        plan, csv, make = cuda.sweep(), cuda_sweep.csv_of, cuda_sweep.make_report
    else:
        plan, csv, make = cuda.comparisons(), csv_of, make_report

    def save(found: Measured) -> None:
        write_csvs(folder, name, csv(found), environment)

    folder.mkdir(parents=True, exist_ok=True)
    for ending in csv(Measured()):  # those of an older run would pass for this one's
        (folder / f"{name}{ending}.csv").unlink(missing_ok=True)
    say = partial(print, flush=True)  # should the process end before its time
    found = cuda.run(timer, environment.copy_gb_per_s, plan, seconds, say, save)
    report = make(environment, found)
    report.show(count=4)  # the others are too wide for a terminal
    for path in report.write(folder):
        print(f"wrote {path}")
    return int(any(failure.ours for failure in found.failures))


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
    environment = read_csv(path, Environment)[0]

    def rows(ending: str, row_type: type) -> list[Any]:
        other = path.with_name(f"{path.stem}{ending}.csv")
        return read_csv(other, row_type) if other.exists() else []

    found = Measured(read_csv(path, CudaRow), rows("-memory", MemoryRow), rows("-kernels", KernelRow))
    tables = _summary_tables(environment, found)
    return [environment.facts, *(line for table in reversed(tables) for line in ("", *table.text().splitlines()))]


def _summary_tables(environment: Environment, found: Measured) -> list[Table]:
    return [
        target_table(
            "Targets (M=4; geometric means over the shapes, of dtypes and layouts the worst)",
            targets(found.times, found.memory, found.kernels, environment.copy_gb_per_s),
        ),
        worst_table(found.times),
        eager_table(found.times),
    ]


def make_report(e: Environment, found: Measured) -> Report:
    """Everything that was found out."""
    drawn = {(name, 4) for name in (OURS, OURS_RELU, OURS_ADD_RELU)}
    drawn |= {
        (name, 1) for name, provider in PROVIDERS.items() if provider.layer == "BatchNorm2d" and provider.compiled
    }
    shown = [row for row in Times(found.times).rows.values() if (row.provider, row.M) in drawn]
    by_dtype = {dtype: [row for row in shown if row.dtype == dtype and row.ratio_to_batchnorm] for dtype in DTYPES}
    warnings = found.warnings
    if not can_plot():
        by_dtype = {}
        warnings.append("No pictures: matplotlib is not installed.")
    return Report(
        kind="cuda",
        environment=e,
        facts=f"{e.facts} Measured in {found.seconds:.0f} s.",
        csv=csv_of(found),
        tables=[
            *_summary_tables(e, found),
            mean_table(found.times),
            shape_table(found.times),
            pass_table(found.times, found.kernels, e.copy_gb_per_s),
            cifar_table(found.times),
            component_table(found.times),
            memory_table(found.memory),
            kernel_table(found.times, [shape_label(shape) for shape in cuda.SHAPES[:2]]),
        ],
        figures={
            f"-{dtype}": plot(rows, f"{dtype}, {e.device}; unit: eager nn.BatchNorm2d with the same operations")
            for dtype, rows in by_dtype.items()
            if rows
        },
        text=_HOW,
        warnings=warnings,
    )


_HOW = """## How this was measured

- Steps are captured in CUDA graphs through the layers themselves (`torch.autograd.grad` for the backward pass), and
  the replays are timed by events behind a kernel that keeps the device waiting until all is queued: no time of the
  host is in them. One process; the providers take turns in rounds, every other round in the reverse order; the first
  replay of a turn is not counted.
- What is compared stands in one comparison, a *phase* (CSV) has one for each input. Ratios are of times from one
  comparison; other figures of layers that several phases measure are those of the first. Phases, in this order: *plain*
  (ours, M=4, and nn.BatchNorm2d), *fused*, *split* and *compiled* in float32 and bfloat16; the *reference* at three
  shapes; *components*, M = 1, 2 and 8, in contiguous tensors; *float16* and *batch 256* without compiled layers;
  *saturated* and *constant* data. *evaluation forward* is not measured for compiled layers and split ones.
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
