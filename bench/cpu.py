"""How fast are the layers on the CPU? float32, two threads, inputs of CIFAR and ImageNet ResNets."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import geometric_mean

import torch

import cbn_ext
from bench.compare import Comparison, compare
from bench.harness import BOTH, MemoryRow, TimeRow
from bench.plot import plot
from bench.providers import BATCHNORM, BATCHNORM_COMPILED, OURS, OURS_SPLIT, REFERENCE, REFERENCE_COMPILED, Case
from bench.report import Report, Target, memory_table, target_table, time_table

THREADS = 2
SHAPES = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (16, 256, 56, 56))

_LAYERS = ((OURS, 4), (BATCHNORM, 1), (OURS, 1), (OURS_SPLIT, 4), (BATCHNORM_COMPILED, 1))
_ALL = (*_LAYERS, (REFERENCE, 4), (REFERENCE_COMPILED, 4))
COMPARISONS = (
    *(Comparison(Case(shape), _ALL) for shape in SHAPES),
    *(Comparison(Case(shape, layout="channels_last"), _LAYERS) for shape in SHAPES),
    *(Comparison(Case(SHAPES[1], data=data), _LAYERS[:2]) for data in ("saturated", "constant")),
)


@dataclass(frozen=True)
class Environment:
    """isa: the instruction set of the native kernels, None where these are not loaded."""

    device: str
    isa: str | None
    threads: int
    torch: str
    cbn_ext: str
    date: str


def run() -> Report:
    """Measure every comparison with the native operators; raises where they are not there, or wrong."""
    load = os.getloadavg()[0]
    torch.set_num_threads(THREADS)
    times: list[TimeRow] = []
    memory: list[MemoryRow] = []
    with cbn_ext.use_backend("native"):
        for number, comparison in enumerate(COMPARISONS, 1):
            print(f"{number} of {len(COMPARISONS)}: {comparison.case}", flush=True)
            rows = compare(comparison)
            times += rows[0]
            memory += rows[1]
    return report(environment(), load, times, memory)


def report(e: Environment, load: float, times: list[TimeRow], memory: list[MemoryRow]) -> Report:
    """What was measured. load: the system's load average before the run."""
    warning = f"The load average before the run was {load:.1f}: other processes disturb these times."
    return Report(
        kind="cpu",
        environment=e,
        facts=f"{e.device}, {e.isa}, {e.threads} threads; torch {e.torch}, cbn_ext {e.cbn_ext}; {e.date}; "
        f"load average before the run {load:.1f}.",
        csv={"": times, "-memory": memory},
        tables=[
            target_table("Targets (forward+backward)", targets(times, memory)),
            time_table(times),
            memory_table(memory),
        ],
        figures={"": plot(times, e.device)},
        text=_HOW,
        warnings=[warning] if load > 0.5 else [],
    )


def environment() -> Environment:
    """This machine's processor and the versions in use."""
    return Environment(
        device=cpu_model(),
        isa=cbn_ext.build_info()["isa"],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cbn_ext=cbn_ext.__version__,
        date=date.today().isoformat(),
    )


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def targets(times: list[TimeRow], memory: list[MemoryRow]) -> list[Target]:
    """What is to be reached beside what is, forward+backward; times as geometric means over the shapes."""

    def ratio(member: tuple[str, int], other: tuple[str, int], layout: str = "contiguous") -> float:
        medians = {
            (row.provider, row.M, row.shape): row.median_us
            for row in times
            if (row.layout, row.data, row.direction) == (layout, "mixed", BOTH)
        }
        shapes = dict.fromkeys(shape for _, _, shape in medians)
        return geometric_mean(medians[(*member, shape)] / medians[(*other, shape)] for shape in shapes)

    def worst(rows: list[MemoryRow], size: Callable[[MemoryRow], int]) -> float:
        mixed = [row for row in rows if row.data == "mixed"]
        unit = {(row.shape, row.layout): size(row) for row in mixed if row.provider == BATCHNORM}
        ours = [row for row in mixed if (row.provider, row.M) == (OURS, 4)]
        return max(size(row) / unit[row.shape, row.layout] for row in ours)

    found = []
    for layout in ("contiguous", "channels_last"):
        for components, limit in ((4, 3), (1, 1.2)):
            value = ratio((OURS, components), (BATCHNORM, 1), layout)
            found.append(Target(f"time, cbn_ext M={components} / BatchNorm2d, {layout}", value, "≤", limit))
    for provider, limit in ((REFERENCE, 15), (REFERENCE_COMPILED, 8)):
        found.append(Target(f"time, {provider} / cbn_ext, M=4", ratio((provider, 4), (OURS, 4)), "≥", limit))
    what = "peak memory, cbn_ext M=4 / BatchNorm2d, worst shape and layout: "
    beyond = worst(memory, lambda row: row.beyond)
    found.append(Target(what + "allocated beyond input and output", beyond, "≤", 1.1))
    found.append(Target(what + "allocated in all", worst(memory, lambda row: row.in_out + row.beyond), "≤", 1.1))
    if measured := [row for row in memory if row.resident is not None]:
        resident = worst(measured, lambda row: row.in_out + row.resident)
        found.append(Target(what + "resident in all", resident, "≤", 1.1))
    return found


_HOW = """## How this was measured

- One process; the providers take turns in rounds, every other round in the reverse order. Training mode; a
  step is the layer's forward and `torch.autograd.grad` for input, weight and bias. The first step of a turn
  is not counted.
- Every provider's output and gradients were compared with the float64 reference before it was timed.
- GB/s counts, for every provider, one read and one write of a tensor of the input's size forward, two reads
  and one write backward.
- *cbn_ext split* normalises each image with the component of its group; the groups are random, as large as each other.
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
