"""How fast are the layers on the CPU? float32, two threads, inputs of CIFAR and ImageNet ResNets."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean

import torch

import cbn_ext
from bench.cases import Case, make_problem
from bench.harness import (
    BOTH,
    DIRECTIONS,
    MemoryRow,
    TimeRow,
    allocated_peak,
    gigabytes_per_second,
    resident_peak,
    time_interleaved,
)
from bench.providers import (
    BATCHNORM,
    COMPILED,
    JOINT,
    OURS,
    REFERENCE,
    SPLIT,
    Checker,
    Comparison,
    LayerWorkload,
    set_up,
)
from bench.report import Environment, Report, Table, Target, number, target_table, versions

THREADS = 2
#: The system's load average before anything was measured: what other processes do.
LOAD = os.getloadavg()[0]
SHAPES = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (16, 256, 56, 56))

_LAYERS = (
    (OURS, 4),
    (BATCHNORM, 1),
    (OURS, 1),
    (OURS + SPLIT, 4),
    (OURS + JOINT, 4),
    (OURS + JOINT, 8),
    (BATCHNORM + COMPILED, 1),
)
_ALL = (*_LAYERS, (REFERENCE, 4), (REFERENCE + COMPILED, 4))
COMPARISONS = (
    *(Comparison(Case(shape), _ALL) for shape in SHAPES),
    *(Comparison(Case(shape, layout="channels_last"), _LAYERS) for shape in SHAPES),
    *(Comparison(Case(SHAPES[1], data=data), _LAYERS[:2]) for data in ("saturated", "constant")),
)


def run(folder: Path) -> None:
    """Measure every comparison with the native operators, show and write the report.

    Raises:
        WrongResultError: a provider computes something else than the reference.
        RuntimeError: there are no native operators.
    """
    torch.set_num_threads(THREADS)
    times: list[TimeRow] = []
    memory: list[MemoryRow] = []
    with cbn_ext.use_backend("native"):
        for number, comparison in enumerate(COMPARISONS, 1):
            print(f"{number} of {len(COMPARISONS)}: {comparison.case}", flush=True)
            rows = compare(comparison)
            times += rows[0]
            memory += rows[1]
    report = make_report(environment(), LOAD, times, memory)
    report.show()
    report.write(folder)


def compare(comparison: Comparison) -> tuple[list[TimeRow], list[MemoryRow]]:
    """Set up, check, time and weigh the members of a comparison."""
    # A compiler that met too many shapes would fall back to eager execution.
    torch.compiler.reset()
    cases = {components: replace(comparison.case, components=components) for _, components in comparison.members}
    problems = {components: make_problem(case) for components, case in cases.items()}
    workloads = {(name, components): set_up(name, problems[components]) for name, components in comparison.members}
    check = Checker()
    for workload in workloads.values():
        check(workload)
    del check

    times = time_interleaved(workloads)
    time_rows = [
        TimeRow(
            provider,
            **cases[components].labels,
            direction=direction,
            **vars(summary),
            gb_per_s=gigabytes_per_second(direction, comparison.case.tensor_bytes, summary.median_us),
            ratio_to_batchnorm=summary.median_us / times[BATCHNORM, 1][direction].median_us,
        )
        for (provider, components), by_direction in times.items()
        for direction, summary in by_direction.items()
    ]
    return time_rows, [memory_row(workload) for workload in workloads.values()]


def memory_row(workload: LayerWorkload) -> MemoryRow:
    """The peak memory of a step."""
    case = workload.problem.case
    resident = resident_peak(workload.tensors)
    return MemoryRow(
        workload.provider.name,
        **case.labels,
        in_out=workload.in_out_bytes,
        beyond=allocated_peak(workload.tensors),
        resident=None if resident is None else resident - workload.in_out_bytes // 2,
    )


def environment() -> Environment:
    """This machine's processor, the instruction set of the native kernels (None without), and the versions in use."""
    isa = cbn_ext.build_info()["isa"]
    return {"device": cpu_model(), "isa": isa, "threads": torch.get_num_threads(), **versions(torch, cbn_ext)}


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def make_report(e: Environment, load: float, times: list[TimeRow], memory: list[MemoryRow]) -> Report:
    """What was measured. load: the system's load average before the run."""
    return Report(
        kind="cpu",
        environment=e,
        facts=f"{e['device']}, {e['isa']}, {e['threads']} threads; torch {e['torch']}, cbn_ext {e['cbn_ext']}; "
        f"{e['date']}; load average before the run {load:.1f}.",
        csv={"": times, "-memory": memory},
        tables=[
            target_table("Targets (forward+backward)", targets(times, memory)),
            time_table(times),
            memory_table(memory),
        ],
        text=_HOW,
        pictures={"": (times, e["device"])},
        warnings=load_warnings(load),
    )


def load_warnings(load: float) -> list[str]:
    """What a reader must know of a system that was not idle."""
    warning = f"The load average before the run was {load:.1f}: other processes disturb these times."
    return [warning] if load > 0.5 else []


def targets(times: list[TimeRow], memory: list[MemoryRow]) -> list[Target]:
    """What is to be reached beside what is, forward+backward; times as geometric means over the shapes."""

    def ratio(member: tuple[str, int], other: tuple[str, int], layout: str = "contiguous") -> float:
        medians = {
            (row.member, row.shape): row.median_us
            for row in times
            if (row.layout, row.data, row.direction) == (layout, "mixed", BOTH)
        }
        shapes = dict.fromkeys(shape for _, shape in medians)
        return geometric_mean(medians[member, shape] / medians[other, shape] for shape in shapes)

    def worst(rows: list[MemoryRow], size: Callable[[MemoryRow], int]) -> float:
        mixed = [row for row in rows if row.data == "mixed"]
        unit = {row.case: size(row) for row in mixed if row.provider == BATCHNORM}
        return max(size(row) / unit[row.case] for row in mixed if row.member == (OURS, 4))

    found = []
    for layout in ("contiguous", "channels_last"):
        for components, limit in ((4, 3), (1, 1.2)):
            value = ratio((OURS, components), (BATCHNORM, 1), layout)
            found.append(Target(f"time, cbn_ext M={components} / BatchNorm2d, {layout}", value, "≤", limit))
    for layout, limit in (("contiguous", 2), ("channels_last", 3.5)):
        value = ratio((OURS + JOINT, 4), (BATCHNORM, 1), layout)
        found.append(Target(f"time, cbn_ext joint M=4 / BatchNorm2d, {layout}", value, "≤", limit))
    for provider, limit in ((REFERENCE, 15), (REFERENCE + COMPILED, 8)):
        found.append(Target(f"time, {provider} / cbn_ext, M=4", ratio((provider, 4), (OURS, 4)), "≥", limit))
    what = "peak memory, cbn_ext M=4 / BatchNorm2d, worst shape and layout: "
    beyond = worst(memory, lambda row: row.beyond)
    found.append(Target(what + "allocated beyond input and output", beyond, "≤", 1.1))
    found.append(Target(what + "allocated in all", worst(memory, lambda row: row.in_out + row.beyond), "≤", 1.1))
    if measured := [row for row in memory if row.resident is not None]:
        resident = worst(measured, lambda row: row.in_out + row.resident)
        found.append(Target(what + "resident in all", resident, "≤", 1.1))
    return found


def time_table(rows: Sequence[TimeRow]) -> Table:
    """The three directions of every provider on every case."""
    header = ("input", "provider", "M", *(f"{d}, µs" for d in DIRECTIONS), "GB/s", "/ BatchNorm2d")
    sections = []
    for label, of_case in groupby(rows, lambda row: row.label):
        sections.append([])
        for (provider, m), group in groupby(of_case, lambda row: row.member):
            by_direction = {row.direction: row for row in group}
            found = (by_direction[direction] for direction in DIRECTIONS)
            cells = (f"{row.median_us:,.0f} ({row.p20_us:,.0f}-{row.p80_us:,.0f})" for row in found)
            both = by_direction[BOTH]
            rates = number(both.gb_per_s), number(both.ratio_to_batchnorm)
            sections[-1].append([label, provider, str(m), *cells, *rates])
    return Table("Time: median (20th-80th percentile); GB/s and ratio of forward+backward", header, sections)


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """Peak memory of every provider on every case."""

    def cells(row: MemoryRow) -> list[str]:
        sizes = row.in_out, row.beyond, row.resident
        return [row.label, row.provider, str(row.M), *(number(size and size / 1024, 1) for size in sizes)]

    return Table(
        "Peak memory of one forward+backward, KiB",
        ("input", "provider", "M", "input and output", "allocated beyond", "resident beyond"),
        [list(map(cells, group)) for _, group in groupby(rows, lambda row: row.label)],
    )


_HOW = """## How this was measured

- One process; the providers take turns in rounds, every other round in the reverse order. Training mode; a
  step is the layer's forward and `torch.autograd.grad` for input, weight and bias. The first step of a turn
  is not counted.
- Every provider's output and gradients were compared with the float64 reference before it was timed.
- GB/s counts, for every provider, one read and one write of a tensor of the input's size forward, two reads
  and one write backward.
- *cbn_ext split* normalises each image with the component of its group; the groups are random, as large as each other.
- *cbn_ext joint* has one mixture over the channels of a point.
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
