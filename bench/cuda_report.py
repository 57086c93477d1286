"""What the CUDA benchmark leaves: targets, tables and plots, of which every row is in the CSV files too."""

import sys
from pathlib import Path

import torch

import cbn_ext
from bench import cuda
from bench.cuda_compare import Measured
from bench.cuda_tables import (
    cifar_table,
    component_table,
    kernel_table,
    mean_table,
    memory_table,
    pass_table,
    path_table,
    shape_table,
)
from bench.cuda_targets import DTYPES, targets
from bench.graphs import Environment, Timer
from bench.harness import write_csv
from bench.plot import can_plot, plot
from bench.providers import OURS, OURS_ADD_RELU, OURS_RELU, PROVIDERS, shape_label
from bench.report import Report, report_name, target_table


def run(seconds: float, folder: Path) -> int:
    """Measure, show and write; the exit status: 1 where anything of ours failed or was wrong.

    Raises:
        SystemExit: there is no GPU, or no CUDA library.
    """
    if not torch.cuda.is_available():
        sys.exit("expected a GPU for the CUDA benchmark; torch finds none")
    if error := cbn_ext.build_info()["cuda_load_error"]:
        sys.exit(f"expected the CUDA library of cbn_ext: {error}")
    timer = Timer()
    environment = timer.environment()
    csv = folder / f"{report_name('cuda', environment.device)}.csv"

    def save(found: Measured) -> None:
        """The times so far, should the process end before its time."""
        if found.times:
            write_csv(csv, found.times, environment)

    folder.mkdir(parents=True, exist_ok=True)
    found = cuda.run(timer, environment.copy_gb_per_s, cuda.comparisons(), seconds, print, save)
    report = make_report(environment, found)
    report.show(count=2)  # the others are too wide for a terminal
    for path in report.write(folder):
        print(f"wrote {path}")
    return int(any(failure.ours for failure in found.failures))


def make_report(e: Environment, found: Measured) -> Report:
    """Everything that was found out."""
    drawn = {(name, 4) for name in (OURS, OURS_RELU, OURS_ADD_RELU)}
    drawn |= {
        (name, 1) for name, provider in PROVIDERS.items() if provider.layer == "BatchNorm2d" and provider.compiled
    }
    shown = [row for row in found.times if row.l2 == "cold" and (row.provider, row.M) in drawn]
    by_dtype = {dtype: [row for row in shown if row.dtype == dtype and row.ratio_to_batchnorm] for dtype in DTYPES}
    warnings = [f"FAILED: {f.what}, {f.where}: {f.error}" for f in found.failures]
    if found.left_out:
        warnings.append(f"Left out, the time was over ({len(found.left_out)}): " + "; ".join(found.left_out))
    if not can_plot():
        by_dtype = {}
        warnings.append("No pictures: matplotlib is not installed.")
    return Report(
        kind="cuda",
        environment=e,
        facts=f"{e.device}, driver {e.driver}; CUDA {e.cuda}, cuDNN {e.cudnn}, torch {e.torch}, cbn_ext {e.cbn_ext}; "
        f"{e.date}. A copy on the device moves {e.copy_gb_per_s:,.0f} GB/s. Measured in {found.seconds:.0f} s.",
        csv={"": found.times, "-memory": found.memory, "-kernels": found.kernels},
        tables=[
            target_table(
                "Targets (M=4; geometric means over the shapes, of dtypes and layouts the worst)",
                targets(found.times, found.memory, found.kernels, e.copy_gb_per_s),
            ),
            mean_table(found.times),
            shape_table(found.times),
            pass_table(found.times, found.kernels, e.copy_gb_per_s),
            cifar_table(found.times),
            path_table(found.times),
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
- L2 *cold*, where nothing is said: a graph's steps each have input, output and gradients of their own, together at
  least three times the L2 cache; all forwards, then all backwards. *Hot* (CSV): all steps share theirs, each
  backward follows its forward; the backward's time is that of both less that of the forward. Only where all fits
  into the cache.
- Before it was timed, every provider's output, gradients and evaluation output were compared with the float64
  reference, in channels of 8 million elements together, the first and the last among them. With a ReLU the gradient
  is expected to pass where the provider's own output is positive.
- At batch 256 only ours and the eager nn.BatchNorm2d are measured. At the other shapes, in float32 and bfloat16, also
  *streaming* (every value read twice) and *one block* (on chip where a block's shared memory suffices, without
  clusters), and in contiguous tensors M = 1, 2 and 8; the eager reference at three of these shapes. *evaluation
  forward* is not measured for compiled providers.
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
